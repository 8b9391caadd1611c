"""Images go from the decoding task to the actor as one row, without loss or copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mint_ray.config.loader import UserError
from mint_ray.images import Frame, ImageError, read_images
from mint_ray.runtime.images import COLUMNS, decode_images, decoded_images, decoding_memory
from tests.test_images import picture

FRAME = Frame(size=16)


@pytest.fixture
def uris(tmp_path: Path) -> list[str | None]:
    """URIs of files and cells, and Nones; more of them than are read ahead."""
    contents = [picture(20 + number, 24) for number in range(20)]
    for number, content in enumerate(contents[:15]):
        (tmp_path / f"{number}.png").write_bytes(content)
    (tmp_path / "bad.png").write_bytes(b"no image")
    pq.write_table(pa.table({"image": contents[15:]}), tmp_path / "x.parquet", row_group_size=2)
    cells = [f"{tmp_path}/x.parquet#column=image&row={row}" for row in (4, 0, 9, 2)]
    files = [f"{tmp_path}/{number}.png" for number in range(15)]
    return [None, *files[:7], f"{tmp_path}/bad.png", cells[0], None, *files[7:], *cells[1:], f"{tmp_path}/none.png"]


def test_decoded_images_are_those_that_read_images_returns(uris: list[str | None]) -> None:
    table = decode_images(uris, FRAME)
    assert (table.schema, len(table)) == (COLUMNS, 1)
    decoded, expected = decoded_images(table), read_images(uris, FRAME)
    assert decoded is not None
    assert [type(image) for image in decoded] == [type(image) for image in expected]
    for image, wanted in zip(decoded, expected, strict=True):
        if isinstance(wanted, np.ndarray):
            assert np.array_equal(image, wanted)  # type: ignore[arg-type]
        elif isinstance(wanted, ImageError):
            assert (image.reason, str(image)) == (wanted.reason, str(wanted))  # type: ignore[union-attr]
    assert [image.reason for image in decoded if isinstance(image, ImageError)] == [
        "image_unknown_format",
        "image_missing",
        "image_missing",
    ]


def test_a_part_may_have_no_image_or_no_record() -> None:
    assert decoded_images(decode_images([None, None], FRAME)) == [None, None]
    assert decoded_images(decode_images([], FRAME)) == []


def test_a_row_of_nulls_means_that_nothing_was_decoded() -> None:
    nulls = pa.Table.from_arrays([pa.nulls(1, kind) for kind in COLUMNS.types], schema=COLUMNS)
    assert decoded_images(nulls) is None


def test_pixels_are_not_copied(uris: list[str | None]) -> None:
    table = decode_images(uris, FRAME)
    _, _, buffer = table["pixels"].chunk(0).buffers()
    images = [image for image in decoded_images(table) or [] if isinstance(image, np.ndarray)]
    assert buffer.size == sum(image.nbytes for image in images) == 18 * 16 * 16 * 3
    assert all(buffer.address <= image.ctypes.data < buffer.address + buffer.size for image in images)


def test_a_missing_column_is_a_user_error(uris: list[str | None]) -> None:
    with pytest.raises(UserError, match="no column 'picture'; found image"):
        decode_images([str(uris[9]).replace("column=image", "column=picture")], FRAME)


def test_the_memory_covers_the_part_twice_and_the_largest_image() -> None:
    frame = Frame(size=224, max_pixels=1_000_000, max_bytes=1_000_000)
    assert decoding_memory(1_000, frame) >= 2 * 1_000 * 224 * 224 * 3 + 2 * 3 * 1_000_000
    assert decoding_memory(2_000, frame) - decoding_memory(1_000, frame) == 2 * 1_000 * 224 * 224 * 3
