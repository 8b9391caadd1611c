"""Decode the images of a part of the records ahead of the teacher that will look at them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mint_ray.images import Frame, ImageError, Seen, read_images_ahead

MAX_AHEAD = 8
"""Images that one task fetches or has decoded while it copies another; part of the memory that it reserves."""
COLUMNS = pa.schema(
    [
        ("size", pa.int64()),
        ("pixels", pa.large_binary()),
        ("reasons", pa.list_(pa.string())),
        ("messages", pa.list_(pa.string())),
    ]
)
"""The images of one part as one row, which Ray Data cannot cut: the pixels of those that could be read, one behind the
other, and for each record null where its image is among them, an empty reason where it has none, or why it cannot be
read."""


def decode_images(uris: Sequence[str | None], frame: Frame) -> pa.Table:
    """The images at `uris` as a row of COLUMNS. Raises what storage raises when it fails."""
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
    # a row of gigabytes is not copied more often than need be
    content = pa.py_buffer(pixels[:decoded].reshape(-1))
    ends = pa.py_buffer(np.array([0, content.size], dtype=np.int64))
    columns = [
        pa.array([frame.size], pa.int64()),
        pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, content]),
        pa.array([reasons], COLUMNS.field("reasons").type),
        pa.array([messages], COLUMNS.field("messages").type),
    ]
    return pa.Table.from_arrays(columns, schema=COLUMNS)


def seen_images(decoded: pa.Table) -> Seen | None:
    """What `decode_images` made, without copying it; None of a row of nulls."""
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
    """The only value of a column, where it lies; a scalar would be a copy."""
    [chunk] = [chunk for chunk in column.chunks if len(chunk)]
    _, ends, content = chunk.buffers()
    start, end = np.frombuffer(ends, dtype=np.int64)[chunk.offset : chunk.offset + 2].tolist()
    return content[start:end]


def memory_to_decode(records: int, frame: Frame) -> int:
    """Bytes that decoding the images of so many records takes at most, for Ray to keep free."""
    part = records * frame.size**2 * 3
    # Pillow holds the image being decoded twice, in up to four bytes a pixel, when it changes its mode
    decoding = 8 * frame.max_pixels + (frame.max_bytes + frame.size**2 * 3) * (MAX_AHEAD + 1)
    return 2 * part + decoding  # the part is copied once, into Ray's object store
