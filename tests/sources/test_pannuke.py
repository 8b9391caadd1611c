"""Tiny synthetic folds in the format of PanNuke."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.images import Frame, ImageError, decode_image
from mint_ray.records import Record
from mint_ray.sources import BadRow, ImageSource, build_source
from mint_ray.sources.config import PanNuke
from mint_ray.sources.nuclei import measure
from mint_ray.sources.pannuke import PanNukeSource, describe_patch
from tests.sources.histology import save_fold


@pytest.fixture
def folds(tmp_path: Path) -> Path:
    for number, tissues in enumerate((["Breast", "Colon"], ["Colon"], ["Liver", "Breast"]), start=1):
        save_fold(tmp_path / f"Fold {number}" / f"fold{number}", tissues, size=64, nuclei=[3, 1])
    return tmp_path


def read(folder: Path | str, **settings: object) -> list[Record | BadRow]:
    return list(build_source(PanNuke(uri=str(folder), **settings)).read())


def test_each_patch_is_a_record_of_its_folds_split_with_its_tissue(folds: Path) -> None:
    rows = read(folds)
    assert [(row.record_id, row.split, row.label_id) for row in rows if isinstance(row, Record)] == [
        ("fold1_00000", "train", "Breast"),
        ("fold1_00001", "train", "Colon"),
        ("fold2_00000", "validation", "Colon"),
        ("fold3_00000", "test", "Liver"),
        ("fold3_00001", "test", "Breast"),
    ]
    assert build_source(PanNuke(uri=str(folds))).labels() == {name: [name] for name in ("Breast", "Colon", "Liver")}


def test_folds_can_be_other_splits_and_be_omitted(folds: Path) -> None:
    rows = read(folds, folds={"fold3": "train", "fold1": "test"})
    assert [(row.record_id, row.split) for row in rows if isinstance(row, Record)] == [
        ("fold3_00000", "train"), ("fold3_00001", "train"), ("fold1_00000", "test"), ("fold1_00001", "test"),
    ]  # fmt: skip


def test_the_nuclei_of_a_patch_are_described_and_counted_by_kind(folds: Path) -> None:
    first, second = (row.fields for row in read(folds)[:2] if isinstance(row, Record))
    assert first["nuclei"] == "3"
    assert (first["neoplastic"], first["inflammatory"], first["epithelial"]) == ("1", "2", "0")
    assert (second["nuclei"], second["neoplastic"], second["inflammatory"]) == ("1", "1", "0")
    # each is 4 x 6 pixels, their centres 10 apart
    assert (float(first["nucleus_area"]), float(first["nucleus_spacing"])) == (24, 10)
    assert float(first["nucleus_cover"]) == pytest.approx(72 / 64**2, rel=1e-3)
    assert all(row.fields == {} for row in read(folds, measure_nuclei=False) if isinstance(row, Record))


def test_a_nucleus_in_two_pieces_is_counted_once() -> None:
    mask = np.zeros((32, 32, 6))
    mask[4:8, 2:6, 4] = mask[4:8, 12:16, 4] = 5
    assert describe_patch(mask)["epithelial"] == "1"
    assert len(measure(mask[..., 4].astype(np.int32))) == 1


def test_a_patch_has_its_original_pixels(tmp_path: Path) -> None:
    images = save_fold(tmp_path / "fold1", ["Breast", "Colon"])
    source = build_source(PanNuke(uri=str(tmp_path), folds={"fold1": "train"}))
    assert isinstance(source, ImageSource)
    for row, record in enumerate(source.read()):
        assert isinstance(record, Record)
        pixels = decode_image(source.image_bytes(record), Frame(size=256), "x")
        assert np.array_equal(pixels, images[row])


def test_arrays_are_memory_mapped(folds: Path) -> None:
    source = PanNukeSource(PanNuke(uri=str(folds)))
    assert isinstance(source.folds["fold1"].images, np.memmap)
    assert isinstance(source.folds["fold1"].masks, np.memmap)


def test_colours_out_of_range_are_an_image_error(folds: Path) -> None:
    place = folds / "Fold 1" / "fold1" / "images" / "fold1" / "images.npy"
    images = np.load(place)
    images[1, 3, 3, 0] = 256
    np.save(place, images)
    source = PanNukeSource(PanNuke(uri=str(folds)))
    rows = [row for row in source.read() if isinstance(row, Record)]
    source.image_bytes(rows[0])
    with pytest.raises(ImageError, match=r"images\.npy:1: ") as caught:
        source.image_bytes(rows[1])
    assert caught.value.reason == "image_out_of_range"


@pytest.mark.parametrize("wrong", ["patches", "size"])
def test_masks_that_do_not_match_the_images_are_named(folds: Path, wrong: str) -> None:
    place = folds / "Fold 3" / "fold3" / "masks" / "fold3" / "masks.npy"
    masks = np.load(place)
    np.save(place, masks[:1] if wrong == "patches" else masks[:, :32])
    with pytest.raises(
        UserError, match=r"fold3/masks\.npy: masks of .* do not match the patches of .*fold3/images\.npy"
    ):
        read(folds)


def test_another_number_of_tissues_is_refused(folds: Path) -> None:
    np.save(folds / "Fold 1" / "fold1" / "images" / "fold1" / "types.npy", np.array(["Breast"]))
    with pytest.raises(UserError, match=r"fold1/types\.npy: 1 tissues for the 2 patches"):
        read(folds)


def test_a_patch_without_a_tissue_is_a_bad_row(folds: Path) -> None:
    np.save(folds / "Fold 1" / "fold1" / "images" / "fold1" / "types.npy", np.array(["Breast", " "]))
    assert [row.reason for row in read(folds) if isinstance(row, BadRow)] == ["no_label"]


def test_pickled_tissues_are_refused_with_a_command_that_converts_them(folds: Path) -> None:
    place = folds / "Fold 1" / "fold1" / "images" / "fold1" / "types.npy"
    np.save(place, np.array(["Breast", "Colon"], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="allow_pickle=True") as caught:
        read(folds)
    assert "\n" not in str(caught.value)
    assert str(place) in str(caught.value)


def test_a_missing_or_repeated_fold_is_named(folds: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"folds: no fold4/images\.npy"):
        read(folds, folds={"fold4": "train"})
    with pytest.raises(UserError, match="copy the folds to a local folder"):
        read("s3://bucket/pannuke")
    shutil.copytree(folds / "Fold 1", folds / "copy")
    with pytest.raises(UserError, match=r"fold1/images\.npy exists twice"):
        read(folds)
    with pytest.raises(UserError, match="one to train on"):
        from_data(PanNuke, {"kind": "pannuke", "uri": "x", "folds": {"fold1": "test"}})


def test_its_identity_changes_with_a_tissue(folds: Path) -> None:
    first = build_source(PanNuke(uri=str(folds))).inputs()
    assert build_source(PanNuke(uri=str(folds))).inputs() == first
    np.save(folds / "Fold 1" / "fold1" / "images" / "fold1" / "types.npy", np.array(["Breast", "Liver"]))
    assert build_source(PanNuke(uri=str(folds))).inputs() != first
