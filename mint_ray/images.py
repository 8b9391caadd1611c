"""Read images from untrusted files: of known formats, bounded in bytes and pixels, decoded once."""

from __future__ import annotations

import dataclasses
import functools
import io
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mint_ray import storage
from mint_ray.config.loader import UserError, one_line

# Pillow only warns of a file that decodes to gigabytes; `Frame.max_pixels` is lower, and an error. Set once: a context
# manager around each decoding would not be safe in threads
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

Pixels = NDArray[np.uint8]
"""Array of shape (height, width, 3): red, green, blue."""

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP")
"""Formats that are decoded. Each decoder can be attacked by malicious files, so there are no more than needed."""
CELL = re.compile(r"(?P<table>.+\.parquet)#column=(?P<column>[^&]+)&row=(?P<row>\d+)")
"""URI of an image in a cell of a Parquet file, as bytes or as the struct {bytes, path} of `datasets`."""
CACHED_ROW_GROUPS = 2
FETCH_THREADS = 8
"""Threads that fetch files: object storage has a latency of tens of milliseconds."""
DECODE_THREADS = 4
"""Threads that decode images: Pillow releases the interpreter's lock."""
MAX_AHEAD = 16

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """Size to which a model's images are brought, and the bounds of the images that are decoded at all."""

    size: int
    """Height and width, in pixels."""
    fit: Literal["crop", "squash", "within"] = "crop"
    """`crop`: scale the shorter side to `size` and keep the center; `squash`: scale both sides; `within`: scale down an
    image whose longer side exceeds `size`, and keep its aspect ratio."""
    max_bytes: int = 32_000_000
    """Maximum size of a file."""
    max_pixels: int = 64_000_000
    """Maximum height times width, checked before anything is decoded."""


REASONS = (
    "image_missing",
    "image_too_many_bytes",
    "image_too_many_pixels",
    "image_unknown_format",
    "image_truncated",
    "image_corrupt",
)
"""Reasons for which an image cannot be read."""


class ImageError(ValueError):
    """Error of an image that cannot be read: `reason`, one of `REASONS`, is counted; the message names the image."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


Images = Sequence[Pixels | ImageError | None]
"""The images of some records, in their order: None for a record without one, the error if it cannot be read."""


def read_images(uris: Sequence[str | None], frame: Frame) -> list[Pixels | ImageError | None]:
    """Return the image at each URI, read as `read_images_ahead` does."""
    return [image for _, image in read_images_ahead(uris, frame, lambda uri: uri)]


def read_images_ahead(
    items: Iterable[Item],
    frame: Frame,
    uri_of: Callable[[Item], str | None],
    *,
    num_threads: int = DECODE_THREADS,
    max_ahead: int = MAX_AHEAD,
) -> Generator[tuple[Item, Pixels | ImageError | None], None, None]:
    """Yield each item with its image, in order, while threads read and decode the images of the items that follow.

    The image is None for an item without a URI, and an ImageError if it cannot be read or decoded. Items are taken from
    `items` as they are needed, so it may be endless. Closing the iterator, or an error in the loop that consumes it,
    cancels the work ahead.

    Args:
        items: The items, in the order in which they are yielded.
        frame: The form of the decoded images.
        uri_of: Function that returns the URI of an item's image.
        num_threads: Threads that decode. Each decodes one image at a time.
        max_ahead: Maximum number of images, encoded or decoded, that wait to be yielded.

    Raises:
        UserError: An image's Parquet table lacks its column.
        OSError: Storage failed; the error is raised at the item that it concerns.
    """
    waiting: deque[tuple[Item, Future[Pixels] | None]] = deque()
    fetchers, decoders = ThreadPoolExecutor(min(FETCH_THREADS, max_ahead)), ThreadPoolExecutor(num_threads)
    try:
        for item in items:
            uri = uri_of(item)
            if uri is None:
                waiting.append((item, None))
            else:
                fetched = fetchers.submit(read_content, uri, frame.max_bytes)
                waiting.append((item, decoders.submit(_decode_fetched, fetched, frame, uri)))
            if len(waiting) > max_ahead:
                yield _wait(*waiting.popleft())
        while waiting:
            yield _wait(*waiting.popleft())
    finally:
        # decoders first: a decoder waits for a fetcher, never the other way round
        decoders.shutdown(wait=False, cancel_futures=True)
        fetchers.shutdown(cancel_futures=True)
        decoders.shutdown()


def read_image(uri: str, frame: Frame) -> Pixels:
    """Return the image at `uri`, a file or a cell `x.parquet#column=image&row=3`, upright and fitted to `frame`.

    Raises:
        ImageError: The image is missing, too large, or cannot be decoded.
        UserError: The Parquet table lacks the column.
        OSError: Storage failed.
    """
    return decode_image(read_content(uri, frame.max_bytes), frame, uri)


def read_content(uri: str, max_bytes: int) -> bytes:
    """Return the encoded image at `uri`. Raises as `read_image` does, except for errors of decoding."""
    if cell := CELL.fullmatch(uri):
        return _read_cell(cell["table"], cell["column"], int(cell["row"]))
    num_bytes = storage.size(uri)
    if num_bytes is None:
        raise ImageError("image_missing", f"{uri}: no such file")
    if num_bytes > max_bytes:
        raise ImageError("image_too_many_bytes", f"{uri}: {num_bytes:,} bytes; the maximum is {max_bytes:,}")
    return storage.read_bytes(uri)


def decode_image(content: bytes, frame: Frame, name: str) -> Pixels:
    """Return the pixels of an encoded image; errors call it `name`. Raises ImageError as `read_image` does."""

    def finish(image: Image.Image) -> Pixels:
        # a JPEG can be decoded at a fraction of its size, which must be no less than twice the wanted one
        image.draft("RGB", (2 * frame.size, 2 * frame.size))
        return _fit(_to_rgb(ImageOps.exif_transpose(image)), frame)

    return _decode(content, name, frame.max_bytes, frame.max_pixels, finish)


def decode_full_size(content: bytes, name: str, max_bytes: int, max_pixels: int) -> Pixels:
    """Return the pixels of an encoded image at its own size, upright. Raises ImageError as `read_image` does."""

    def finish(image: Image.Image) -> Pixels:
        return np.array(_to_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)

    return _decode(content, name, max_bytes, max_pixels, finish)


def encode_image(pixels: Pixels) -> bytes:
    """Return a PNG file of the pixels."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def _decode(
    content: bytes, name: str, max_bytes: int, max_pixels: int, finish: Callable[[Image.Image], Pixels]
) -> Pixels:
    if len(content) > max_bytes:
        raise ImageError("image_too_many_bytes", f"{name}: {len(content):,} bytes; the maximum is {max_bytes:,}")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                "image_too_many_pixels", f"{name}: {width:,} x {height:,} pixels; the maximum is {max_pixels:,} in all"
            )
        return finish(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_many_pixels", f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError("image_unknown_format", f"{name}: not one of {', '.join(FORMATS)}") from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, IndexError, TypeError, KeyError) as error:
        # Pillow's decoders raise errors of many types
        message = one_line(error)
        cut_off = "truncated" in message or isinstance(error, EOFError)
        raise ImageError("image_truncated" if cut_off else "image_corrupt", f"{name}: {message}") from error


def _decode_fetched(fetched: Future[bytes], frame: Frame, uri: str) -> Pixels:
    return decode_image(fetched.result(), frame, uri)


def _wait(item: Item, decoded: Future[Pixels] | None) -> tuple[Item, Pixels | ImageError | None]:
    try:
        return item, None if decoded is None else decoded.result()
    except ImageError as error:
        return item, error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # 16-bit gray: Pillow would clip it at 255
        gray = np.asarray(image, dtype=np.float64)
        span = 65535.0 if gray.max(initial=0) > 255 else 255.0
        image = Image.fromarray(np.clip(gray / span * 255, 0, 255).astype(np.uint8))
    return image.convert("RGB")


def _fit(image: Image.Image, frame: Frame) -> Pixels:
    size = (frame.size, frame.size)
    if frame.fit == "within":
        image.thumbnail(size, Image.Resampling.BICUBIC)
    elif image.size != size:
        if frame.fit == "crop":
            image = ImageOps.fit(image, size, method=Image.Resampling.BICUBIC)
        else:
            image = image.resize(size, Image.Resampling.BICUBIC)
    return np.array(image, dtype=np.uint8)


def _read_cell(table: str, column: str, row: int) -> bytes:
    if not storage.exists(table):
        raise ImageError("image_missing", f"{table}: no such file")
    start = 0
    with _TABLES_LOCK:
        row_groups = _row_groups(table)
    for group, rows in enumerate(row_groups):
        if row < start + rows:
            with _TABLES_LOCK:
                values = _read_row_group(table, column, group)
            value = values[row - start].as_py()
            content = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(content, bytes):
                raise ImageError("image_missing", f"{table}: {column}: row {row} contains no image")
            return content
        start += rows
    raise ImageError("image_missing", f"{table}: no row {row} among {start}")


_TABLES_LOCK = threading.Lock()
"""Held while a footer or a row group is read: threads that want neighbouring rows wait for it instead of reading it."""


@functools.lru_cache(maxsize=64)
def _row_groups(table: str) -> list[int]:
    with storage.open_input(table) as stream:
        metadata = pq.read_metadata(stream)
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


@functools.lru_cache(maxsize=CACHED_ROW_GROUPS)
def _read_row_group(table: str, column: str, group: int) -> pa.ChunkedArray:
    """Read one column of a row group. Consecutive rows are requested together, so that each group is read once."""
    with storage.open_input(table) as stream:
        file = pq.ParquetFile(stream)
        if column not in file.schema_arrow.names:
            raise UserError(f"{table}: no column {column!r}; found {', '.join(file.schema_arrow.names)}")
        kind = file.schema_arrow.field(column).type
        if isinstance(kind, pa.BaseExtensionType):
            # reading an extension type may run code of its own, or unpickle
            raise UserError(f"{table}: column {column!r}: expected images as bytes, got {kind}")
        return file.read_row_group(group, columns=[column])[column]
