"""Tiles and crops of histology images, with the measurements of their nuclei."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mint_ray.config.loader import UserError, from_data
from mint_ray.images import decode_full_size
from mint_ray.records import Record
from mint_ray.sources import BadRow, ImageSource, build_source
from mint_ray.sources.config import Tiles
from tests.sources.histology import aperio, ellipses, png

CENTRES = [(20.0, 20.0), (20.0, 70.0), (70.0, 70.0)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two images of 100 x 120 pixels, one with a mask and one with contours, and the table that names them."""
    draw = np.random.default_rng(0)
    for name in ("images", "masks", "xml"):
        (tmp_path / name).mkdir()
    for name in ("P1-a", "P2-b"):
        pixels = draw.integers(0, 256, (100, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "masks" / "P1-a.png").write_bytes(png(ellipses(100, 120, CENTRES, (5, 5))))
    square = [(60.0, 60.0), (69.0, 60.0), (69.0, 69.0), (60.0, 69.0)]
    (tmp_path / "xml" / "P2-b.xml.gz").write_bytes(aperio([square]))
    (tmp_path / "images.csv").write_text("image,organ,stain\nP1-a,lung,dark\nP2-b,colon,pale\n")
    return tmp_path


def tiles(folder: Path, **settings: Any) -> Any:
    columns = {"record_id": "image", "group_id": "image", "label_id": "organ", "image_uri": "image"}
    table = {"kind": "table", "uri": f"{folder}/images.csv", "images": f"{folder}/images/{{}}.png", "group_pattern": "^..",
             "columns": columns | {"fields.stain": "stain"}}  # fmt: skip
    outlines = {"masks": f"{folder}/masks/{{}}.png", "contours": f"{folder}/xml/{{}}.xml.gz"}
    return build_source(from_data(Tiles, {"kind": "tiles", "images": table, "tile_size": 50} | outlines | settings))


def records(source: Any) -> list[Record]:
    return [row for row in source.read() if isinstance(row, Record)]


def test_tiles_are_adjacent_and_inherit_from_their_image(folder: Path) -> None:
    rows = records(tiles(folder))
    assert [row.record_id for row in rows[:4]] == [f"P1-a_{y:05d}_{x:05d}" for y in (0, 50) for x in (0, 50)]
    assert len(rows) == 8
    assert {(row.group_id, row.label_id, row.fields["stain"]) for row in rows} == {
        ("P1", "lung", "dark"), ("P2", "colon", "pale"),
    }  # fmt: skip
    assert tiles(folder).labels() == {"lung": ["lung"], "colon": ["colon"]}


def test_each_tile_is_described_by_its_own_nuclei_from_mask_or_contours(folder: Path) -> None:
    counts = {row.record_id: row.fields["nuclei"] for row in records(tiles(folder))}
    assert [counts[f"P1-a_{y:05d}_{x:05d}"] for y in (0, 50) for x in (0, 50)] == ["1", "1", "0", "1"]
    assert [counts[f"P2-b_{y:05d}_{x:05d}"] for y in (0, 50) for x in (0, 50)] == ["0", "0", "0", "1"]
    last = records(tiles(folder))[-1].fields
    assert (float(last["nucleus_area"]), float(last["nucleus_cover"])) == (100, 100 / 2500)


def test_without_masks_or_contours_nothing_is_measured(folder: Path) -> None:
    assert {tuple(row.fields) for row in records(tiles(folder, masks=None, contours=None))} == {("stain",)}


def test_a_tile_has_the_pixels_of_its_part_of_the_image(folder: Path) -> None:
    source = tiles(folder)
    assert isinstance(source, ImageSource)
    whole = np.asarray(Image.open(folder / "images" / "P1-a.png"))
    for row in records(source)[:4]:
        top, left = map(int, row.record_id.split("_")[1:])
        pixels = decode_full_size(source.image_bytes(row), "x", 10**6, 10**6)
        assert np.array_equal(pixels, whole[top : top + 50, left : left + 50])


def test_a_crop_has_a_nucleus_in_its_centre(folder: Path) -> None:
    rows = records(tiles(folder, tiling="nuclei", tile_size=24))
    # one crop per nucleus, from half of 24 above and left of its centre
    assert [row.record_id for row in rows] == [
        *(f"P1-a_{int(y) - 12:05d}_{int(x) - 12:05d}" for y, x in CENTRES), "P2-b_00052_00052",
    ]  # fmt: skip
    assert {row.fields["nuclei"] for row in rows} == {"1"}


def test_a_nucleus_too_near_the_edge_has_no_crop(folder: Path) -> None:
    assert [row.record_id for row in records(tiles(folder, tiling="nuclei", tile_size=50))] == [
        "P1-a_00045_00045", "P2-b_00040_00040",
    ]  # fmt: skip


def test_a_random_sample_of_tiles_is_repeatable(folder: Path) -> None:
    some = [row.record_id for row in records(tiles(folder, max_tiles_per_image=2))]
    assert len(some) == 4
    assert some == [row.record_id for row in records(tiles(folder, max_tiles_per_image=2))]
    assert set(some) < {row.record_id for row in records(tiles(folder))}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("masks/P1-a.png", png(np.zeros((100, 100), np.uint8)), "mask_size"),
        ("masks/P1-a.png", b"x", "mask_unreadable"),
        ("xml/P2-b.xml.gz", b"x", "contours_unreadable"),
        ("xml/P2-b.xml.gz", aperio([[(0, 0), (999, 0), (999, 999)]]), "contours_outside"),
        ("images/P2-b.png", b"x", "image_unknown_format"),
        ("images/P2-b.png", png(np.zeros((40, 90, 3), np.uint8)), "image_too_small"),
    ],
)
def test_an_invalid_image_is_a_bad_row_with_its_reason(folder: Path, name: str, content: bytes, reason: str) -> None:
    (folder / name).write_bytes(content)
    rows = list(tiles(folder).read())
    [bad] = [row for row in rows if isinstance(row, BadRow)]
    assert bad.reason == reason
    assert name.partition("/")[2].partition(".")[0] in bad.message
    assert len(rows) == 5


def test_an_image_without_mask_and_contours_is_a_bad_row(folder: Path) -> None:
    (folder / "masks" / "P1-a.png").unlink()
    (folder / "masks" / "other.png").write_bytes(b"")
    [bad] = [row for row in tiles(folder).read() if isinstance(row, BadRow)]
    assert (bad.reason, "P1-a.xml.gz or " in bad.message) == ("no_outlines", True)


def test_its_identity_changes_with_a_mask(folder: Path) -> None:
    first = tiles(folder).inputs()
    assert tiles(folder).inputs() == first
    (folder / "masks" / "P1-a.png").write_bytes(png(np.zeros((100, 120), np.uint8)))
    assert tiles(folder).inputs() != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile_size": 0}, "tile_size must be positive"),
        ({"max_tiles_per_image": 0}, "max_tiles_per_image must be positive"),
        ({"masks": "x/y.png"}, r"masks: expected one \{\}"),
        ({"tiling": "nuclei", "masks": None, "contours": None}, "needs masks or contours"),
    ],
)
def test_invalid_settings_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiles(folder, **settings)
