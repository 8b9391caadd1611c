"""Images are read by URI, within bounds, in order, and decoded ahead in threads."""

from __future__ import annotations

import gc
import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mint_ray import images as images_module
from mint_ray.config.loader import UserError
from mint_ray.images import (
    Frame,
    ImageError,
    Pixels,
    decode_full_size,
    decode_image,
    encode_image,
    read_image,
    read_images,
    read_images_ahead,
)

FRAME = Frame(size=32)


def picture(width: int = 48, height: int = 64, form: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(target, form)
    return target.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header claims a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def reason(content: bytes, frame: Frame = FRAME) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(content, frame, "x.png")
    assert str(caught.value).startswith("x.png: ")
    return caught.value.reason


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "BMP"])
def test_every_known_format_is_read_in_the_size_asked_for(form: str) -> None:
    image = decode_image(picture(form=form), FRAME, "x")
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    content = picture(32, 32)
    assert np.array_equal(decode_image(content, FRAME, "x"), np.asarray(Image.open(io.BytesIO(content))))


def test_crop_keeps_the_center_and_squash_keeps_everything() -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    assert decode_image(target.getvalue(), FRAME, "x").min() == 255
    squashed = decode_image(target.getvalue(), Frame(size=32, fit="squash"), "x")
    assert (squashed[:, 0].max(), squashed[:, 16].min(), squashed[:, 31].max()) == (0, 255, 0)


def test_an_image_is_turned_upright_by_its_exif_orientation() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG", exif=exif)
    upright = decode_image(target.getvalue(), FRAME, "x")
    assert (upright[0].max(), upright[-1].min()) == (0, 255)


def test_16_bit_gray_keeps_its_order() -> None:
    gray = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    target = io.BytesIO()
    Image.fromarray(gray).save(target, "PNG")
    image = decode_image(target.getvalue(), FRAME, "x")[..., 0].astype(int).ravel()
    assert (np.diff(image) >= 0).all()
    assert 120 < image[len(image) // 2] < 135


def test_a_file_that_is_no_image_is_refused_with_a_reason() -> None:
    assert reason(b"not an image") == "image_unknown_format"
    assert reason(b"") == "image_unknown_format"
    assert reason(picture(form="GIF")) == "image_unknown_format"
    jpeg = picture(200, 200, "JPEG")
    assert reason(jpeg[: len(jpeg) // 2]) == "image_truncated"
    png = bytearray(picture(200, 200))
    png[60:90] = b"\0" * 30
    assert reason(bytes(png)) in ("image_corrupt", "image_truncated")


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    assert reason(bomb(60_000, 60_000)) == "image_too_many_pixels"
    assert reason(bomb(12_000, 12_000), Frame(size=32, max_pixels=1_000_000)) == "image_too_many_pixels"
    assert reason(picture(), Frame(size=32, max_bytes=100)) == "image_too_many_bytes"


def test_the_size_of_a_file_is_checked_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(10**11)  # sparse: reading it would take all memory
    with pytest.raises(ImageError, match="100,000,000,000 bytes"):
        read_image(str(tmp_path / "x.png"), FRAME)


def test_a_bad_image_does_not_affect_the_others(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "bad.png").write_bytes(b"x")
    uris = [str(tmp_path / name) for name in ("good.png", "bad.png", "none.png")]
    good, bad, missing, absent = read_images([*uris, None], FRAME)
    assert isinstance(good, np.ndarray)
    assert isinstance(bad, ImageError)
    assert isinstance(missing, ImageError)
    assert (bad.reason, missing.reason, absent) == ("image_unknown_format", "image_missing", None)


@pytest.mark.parametrize(
    ("width", "height", "shape"), [(200, 100, (32, 64, 3)), (30, 300, (64, 6, 3)), (20, 10, (10, 20, 3))]
)
def test_within_scales_an_image_down_and_keeps_its_aspect_ratio(
    width: int, height: int, shape: tuple[int, int, int]
) -> None:
    assert decode_image(picture(width, height), Frame(size=64, fit="within"), "x").shape == shape


def test_images_are_read_from_the_cells_of_a_table(tmp_path: Path) -> None:
    contents = [picture(32 + i, 32) for i in range(5)]
    path = tmp_path / "images.parquet"
    cells = [{"bytes": content, "path": None} for content in contents]
    pq.write_table(pa.table({"image": contents, "cell": cells, "name": list("abcde")}), path, row_group_size=2)
    for row, content in enumerate(contents):
        for column in ("image", "cell"):
            found = read_image(f"{path}#column={column}&row={row}", FRAME)
            assert np.array_equal(found, decode_image(content, FRAME, "x"))
    with pytest.raises(ImageError, match="no row 5 among 5"):
        read_image(f"{path}#column=image&row=5", FRAME)
    with pytest.raises(ImageError, match="row 0 contains no image"):
        read_image(f"{path}#column=name&row=0", FRAME)
    with pytest.raises(UserError, match="no column 'other'; found image, cell, name"):
        read_image(f"{path}#column=other&row=0", FRAME)


@pytest.mark.s3
def test_images_are_read_from_object_storage(s3_root: str) -> None:
    from mint_ray import storage

    storage.write_bytes(f"{s3_root}/x.png", picture())
    assert read_image(f"{s3_root}/x.png", FRAME).shape == (32, 32, 3)
    with pytest.raises(ImageError) as caught:
        read_image(f"{s3_root}/none.png", FRAME)
    assert caught.value.reason == "image_missing"


def test_an_image_at_full_size_survives_being_encoded() -> None:
    pixels = decode_full_size(picture(48, 64), "x.png", 10**6, 10**6)
    assert pixels.shape == (64, 48, 3)
    assert np.array_equal(decode_full_size(encode_image(pixels), "x.png", 10**6, 10**6), pixels)


def test_an_image_at_full_size_is_bounded_as_any_other() -> None:
    for content, bounds, reason in (
        (picture(), (10, 10**6), "image_too_many_bytes"),
        (bomb(9_000, 9_000), (10**6, 10**6), "image_too_many_pixels"),
        (picture()[:200], (10**6, 10**6), "image_truncated"),
    ):
        with pytest.raises(ImageError) as caught:
            decode_full_size(content, "x.png", *bounds)
        assert caught.value.reason == reason


class SlowDecoder:
    """Stands in for `images.decode_image` and counts: images decoded, and the most that were decoded at once."""

    def __init__(self, seconds: float = 0.01, fail_at: int | None = None) -> None:
        self.seconds, self.fail_at = seconds, fail_at
        self.lock = threading.Lock()
        self.running = self.max_running = self.decoded = 0

    def __call__(self, content: bytes, frame: Frame, name: str) -> Pixels:
        with self.lock:
            self.running += 1
            self.max_running = max(self.max_running, self.running)
        time.sleep(self.seconds)
        with self.lock:
            self.running -= 1
            self.decoded += 1
        number = int(Path(name).stem)
        if number == self.fail_at:
            raise OSError(f"{name}: storage failed")
        return np.full((2, 2, 3), number, np.uint8)


@pytest.fixture
def numbered(tmp_path: Path) -> list[str]:
    """Forty files, named by number; what is in them is not decoded."""
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    return [str(tmp_path / f"{number}.png") for number in range(40)]


def no_thread_is_left(before: int) -> bool:
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    return threading.active_count() <= before


def test_items_come_in_order_with_their_images_although_threads_decode_them(
    numbered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = SlowDecoder()
    monkeypatch.setattr(images_module, "decode_image", decoder)
    items = [{"uri": uri, "number": number} for number, uri in enumerate(numbered)]
    items.insert(7, {"uri": None, "number": None})
    found = list(read_images_ahead(items, FRAME, lambda item: item["uri"], num_threads=4))  # type: ignore[arg-type,return-value]
    assert [item for item, _ in found] == items
    assert [image if image is None else int(image[0, 0, 0]) for _, image in found] == [  # type: ignore[index]
        item["number"] for item in items
    ]
    assert 2 <= decoder.max_running <= 4


def test_a_consumer_that_is_slow_bounds_what_is_decoded_ahead(
    numbered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = SlowDecoder(seconds=0)
    monkeypatch.setattr(images_module, "decode_image", decoder)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            for uri in numbered:
                taken += 1
                yield uri

    images = read_images_ahead(endless(), FRAME, str, max_ahead=5)
    for consumed in range(1, 11):
        next(images)
        time.sleep(0.02)
        assert decoder.decoded <= taken == consumed + 5
    images.close()  # type: ignore[attr-defined]


def test_a_consumer_that_stops_early_or_fails_leaves_no_thread_and_no_work(
    numbered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = SlowDecoder()
    monkeypatch.setattr(images_module, "decode_image", decoder)
    before = threading.active_count()
    for _ in read_images_ahead(numbered, FRAME, str, num_threads=1, max_ahead=30):
        break
    gc.collect()
    assert no_thread_is_left(before)
    with pytest.raises(ZeroDivisionError):
        for _ in read_images_ahead(numbered, FRAME, str, num_threads=1, max_ahead=30):
            raise ZeroDivisionError
    assert no_thread_is_left(before)
    assert decoder.decoded < 10


def test_an_error_of_storage_is_raised_at_the_item_that_it_concerns(
    numbered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "decode_image", SlowDecoder(seconds=0, fail_at=3))
    before, seen = threading.active_count(), []
    with pytest.raises(OSError, match=r"3\.png: storage failed"):
        for uri, _ in read_images_ahead(numbered, FRAME, str):
            seen.append(uri)
    assert seen == numbered[:3]
    assert no_thread_is_left(before)


def test_a_row_group_is_read_once_although_threads_want_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "images.parquet"
    pq.write_table(pa.table({"image": [picture(32 + row, 32) for row in range(24)]}), path, row_group_size=12)
    opened: list[str] = []

    def open_input(uri: str) -> object:
        opened.append(uri)
        return open_stored(uri)

    open_stored = images_module.storage.open_input
    monkeypatch.setattr(images_module.storage, "open_input", open_input)
    uris = [f"{path}#column=image&row={row}" for row in range(24)]
    found = read_images(uris, FRAME)
    assert all(isinstance(image, np.ndarray) for image in found)
    # the footer, and each of the two row groups
    assert len(opened) == 3
