"""Decode the images of a part of the records in a task, ahead of the actor that needs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mint_ray.images import Frame, ImageError, Images, read_images_ahead

MAX_AHEAD = 8
"""Maximum number of images that a task fetches and decodes ahead; they count towards its memory."""
COLUMNS = pa.schema(
    [
        ("size", pa.int64()),
        ("pixels", pa.large_binary()),
        ("reasons", pa.list_(pa.string())),
        ("messages", pa.list_(pa.string())),
    ]
)
"""Images of one part as one row, which Ray Data cannot split. `pixels` has those that could be read, concatenated. The
list `reasons` has for each record null if its image is among them, "" if it has none, or the reason of its error."""


def decode_images(uris: Sequence[str | None], frame: Frame) -> pa.Table:
    """Return the images at `uris` as one row of COLUMNS. Raises OSError if storage fails."""
    pixels = np.empty((sum(uri is not None for uri in uris), frame.size, frame.size, 3), dtype=np.uint8)
    decoded = 0
    reasons: list[str | None] = []
    messages: list[str | None] = []
    for _, image in read_images_ahead(uris, frame, lambda uri: uri, num_threads=1, max_ahead=MAX_AHEAD):
        reason = message = None
        if image is None:
            reason = ""
        elif isinstance(image, ImageError):
            reason, message = image.reason, str(image)
        else:
            pixels[decoded] = image
            decoded += 1
        reasons.append(reason)
        messages.append(message)
    # built from buffers, as a row of gigabytes should not be copied
    content = pa.py_buffer(pixels[:decoded].reshape(-1))
    ends = pa.py_buffer(np.array([0, content.size], dtype=np.int64))
    columns = [
        pa.array([frame.size], pa.int64()),
        pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, content]),
        pa.array([reasons], COLUMNS.field("reasons").type),
        pa.array([messages], COLUMNS.field("messages").type),
    ]
    return pa.Table.from_arrays(columns, schema=COLUMNS)


def decoded_images(decoded: pa.Table) -> Images | None:
    """Return the images that `decode_images` decoded, without a copy; None for a row of nulls."""
    if not decoded["size"][0].is_valid:
        return None
    size = decoded["size"][0].as_py()
    pixels = np.frombuffer(_bytes_of(decoded["pixels"]), dtype=np.uint8).reshape(-1, size, size, 3)
    reasons, messages = decoded["reasons"][0].as_py(), decoded["messages"][0].as_py()
    following = iter(pixels)
    return [
        next(following) if reason is None else ImageError(reason, message) if reason else None
        for reason, message in zip(reasons, messages, strict=True)
    ]


def _bytes_of(column: pa.ChunkedArray) -> pa.Buffer:
    """Return the buffer of the only value of a column; a scalar would be a copy."""
    [chunk] = [chunk for chunk in column.chunks if len(chunk)]
    _, ends, content = chunk.buffers()
    start, end = np.frombuffer(ends, dtype=np.int64)[chunk.offset : chunk.offset + 2].tolist()
    return content[start:end]


def decoding_memory(num_records: int, frame: Frame) -> int:
    """Return the maximum memory, in bytes, of a task that decodes the images of `num_records` records."""
    part = num_records * frame.size**2 * 3
    # Pillow has the image that it decodes twice, with up to four bytes per pixel, when it changes its mode
    decoding = 8 * frame.max_pixels + (frame.max_bytes + frame.size**2 * 3) * (MAX_AHEAD + 1)
    return 2 * part + decoding  # the part is copied once, into Ray's object store
