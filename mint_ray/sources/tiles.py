"""Cut pictures of tissue into tiles, or into crops round their nuclei, and measure the nuclei of each."""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import zlib
from collections.abc import Iterator

import numpy as np

from mint_ray import storage
from mint_ray.images import ImageError, Pixels, decode_whole, encode_image, read_content
from mint_ray.records import Record
from mint_ray.sources import BadRow, Source
from mint_ray.sources.config import ImageFolder, Tiles
from mint_ray.sources.image_folder import ImageFolderSource
from mint_ray.sources.nuclei import (
    MOST_CONTOUR_BYTES,
    Instances,
    Nuclei,
    OutlinesError,
    measure,
    read_contours,
    read_mask,
)
from mint_ray.sources.table import TableSource

BOX = re.compile(r"(?P<picture>.+)#box=(?P<left>\d+),(?P<top>\d+),(?P<size>\d+)")
"""A tile of a picture, for this source alone: what others are given is a cell that holds it."""


class TilesSource:
    """One record per tile, with the label, group, split and fields of its picture."""

    def __init__(self, config: Tiles) -> None:
        self.config = config
        pictures = config.pictures
        self.pictures: Source = (
            ImageFolderSource(pictures) if isinstance(pictures, ImageFolder) else TableSource(pictures)
        )
        self._held: tuple[str, Pixels] | None = None

    def inputs(self) -> dict[str, str]:
        found = self.pictures.inputs()
        for template in filter(None, (self.config.masks, self.config.contours)):
            folder = template.partition("{}")[0].rpartition("/")[0] or "."
            sizes = storage.file_sizes(folder)
            lines = [f"{place.removeprefix(folder)}\t{size}\n" for place, size in sizes.items()]
            found[template] = hashlib.sha256("".join(lines).encode()).hexdigest()
        return found

    def read(self) -> Iterator[Record | BadRow]:
        for row in self.pictures.read():
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                yield from self._cut(row)
            except (ImageError, OutlinesError) as error:
                where = f"picture {row.record_id!r}"
                yield BadRow(where, error.reason, f"{where}: {error}")

    def labels(self) -> dict[str, list[str]]:
        return self.pictures.labels()

    def draw(self, record: Record) -> bytes:
        """PNG of a tile."""
        box = BOX.fullmatch(record.image_uri or "")
        if box is None:
            raise ValueError(f"record {record.record_id!r} is none of this source: {record.image_uri}")
        left, top, size = int(box["left"]), int(box["top"]), int(box["size"])
        return encode_image(np.ascontiguousarray(self._picture(box["picture"])[top : top + size, left : left + size]))

    def _cut(self, picture: Record) -> Iterator[Record]:
        if picture.image_uri is None:
            raise ImageError("image_missing", "has no image")
        pixels = self._picture(picture.image_uri)
        height, width = pixels.shape[:2]
        size = self.config.size
        if min(height, width) < size:
            raise ImageError("image_too_small", f"{picture.image_uri}: {width} x {height} pixels, tiles of {size}")
        nuclei = self._measure(picture, height, width)
        windows = _grid(height, width, size) if self.config.cut == "grid" else _round(nuclei, height, width, size)
        if self.config.most is not None and len(windows) > self.config.most:
            draw = random.Random(f"{self.config.seed}:{picture.record_id}")
            windows = sorted(draw.sample(windows, self.config.most))
        for top, left in windows:
            described = {} if nuclei is None else nuclei.within(top, left, size, size).describe(size * size)
            yield Record(
                record_id=f"{picture.record_id}_{top:05d}_{left:05d}",
                group_id=picture.group_id,
                label_id=picture.label_id,
                split=picture.split,
                text=picture.text,
                image_uri=f"{picture.image_uri}#box={left},{top},{size}",
                fields=picture.fields | described,
                citations=picture.citations,
            )

    def _picture(self, uri: str) -> Pixels:
        """Its tiles are asked for one after the other, so that it is decoded once."""
        if self._held is None or self._held[0] != uri:
            config = self.config
            pixels = decode_whole(read_content(uri, config.max_bytes), uri, config.max_bytes, config.max_pixels)
            self._held = (uri, pixels)
        return self._held[1]

    def _measure(self, picture: Record, height: int, width: int) -> Nuclei | None:
        """None where nothing is to be measured. Raises OutlinesError where it is and cannot be."""
        if self.config.masks is None and self.config.contours is None:
            return None
        instances = self._outlines(picture.record_id, height, width)
        if instances.shape != (height, width):
            raise OutlinesError(
                "mask_size",
                f"a mask of {instances.shape[1]} x {instances.shape[0]} pixels, yet it is {width} x {height}",
            )
        return measure(instances)

    def _outlines(self, picture_id: str, height: int, width: int) -> Instances:
        places = {
            kind: storage.absolute(template.replace("{}", picture_id))
            for kind, template in (("contours", self.config.contours), ("masks", self.config.masks))
            if template is not None
        }
        if ".." in picture_id.split("/"):
            raise OutlinesError("no_outlines", f"{picture_id!r} leads out of the folder")
        for kind, place in places.items():
            if storage.exists(place):
                content = _unpacked(place, self.config.max_bytes)
                if kind == "contours":
                    return read_contours(content, place, height, width)
                return read_mask(content, place, self.config.max_pixels)
        raise OutlinesError("no_outlines", f"nothing lies at {' or '.join(places.values())}")


def _grid(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Upper left corners of tiles side by side."""
    return [(top, left) for top in range(0, height - size + 1, size) for left in range(0, width - size + 1, size)]


def _round(nuclei: Nuclei | None, height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Upper left corners of windows round the nuclei that have room for one."""
    if nuclei is None:
        return []
    corners = {
        (round(row - size / 2), round(column - size / 2)) for row, column in zip(nuclei.row, nuclei.column, strict=True)
    }
    return sorted((top, left) for top, left in corners if 0 <= top <= height - size and 0 <= left <= width - size)


def _unpacked(place: str, max_bytes: int) -> bytes:
    size = storage.size(place)
    if size is None or size > max_bytes:
        raise OutlinesError("outlines_too_large", f"{place}: {size} bytes, at most {max_bytes:,}")
    if not place.endswith(".gz"):
        return storage.read_bytes(place)
    try:
        with storage.open_input(place) as stream, gzip.GzipFile(fileobj=stream) as plain:
            return plain.read(MOST_CONTOUR_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise OutlinesError("contours_unreadable", f"{place}: {' '.join(str(error).split())}") from error
