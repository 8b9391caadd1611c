"""Records of tiles of histology images, or of crops around nuclei, with measurements of their nuclei."""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import zlib
from collections.abc import Iterator

import numpy as np

from mint_ray import storage
from mint_ray.config.loader import one_line
from mint_ray.images import ImageError, Pixels, decode_full_size, encode_image, read_content
from mint_ray.records import Record
from mint_ray.sources import BadRow, Source
from mint_ray.sources.config import ImageFolder, Tiles
from mint_ray.sources.image_folder import ImageFolderSource
from mint_ray.sources.nuclei import (
    MAX_CONTOUR_BYTES,
    Instances,
    Nuclei,
    OutlinesError,
    measure,
    read_contours,
    read_mask,
)
from mint_ray.sources.table import TableSource

BOX = re.compile(r"(?P<image>.+)#box=(?P<left>\d+),(?P<top>\d+),(?P<size>\d+)")
"""URI of a tile, used only by this source: the stored records refer to the cell that contains the tile."""


class TilesSource:
    """One record per tile, with the label, group, split and fields of its image."""

    def __init__(self, config: Tiles) -> None:
        self.config = config
        images = config.images
        self.images: Source = ImageFolderSource(images) if isinstance(images, ImageFolder) else TableSource(images)
        self._decoded: tuple[str, Pixels] | None = None

    def inputs(self) -> dict[str, str]:
        """Return the identity of the images, and a digest of the names and sizes of masks and contours."""
        found = self.images.inputs()
        for template in filter(None, (self.config.masks, self.config.contours)):
            folder = template.partition("{}")[0].rpartition("/")[0] or "."
            sizes = storage.file_sizes(folder)
            lines = [f"{uri.removeprefix(folder)}\t{size}\n" for uri, size in sizes.items()]
            found[template] = hashlib.sha256("".join(lines).encode()).hexdigest()
        return found

    def read(self) -> Iterator[Record | BadRow]:
        """Yield the tiles of each image, or the reason why the image has none."""
        for row in self.images.read():
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                yield from self._tiles(row)
            except (ImageError, OutlinesError) as error:
                location = f"image {row.record_id!r}"
                yield BadRow(location, error.reason, f"{location}: {error}")

    def labels(self) -> dict[str, list[str]]:
        """Return the names of the images' labels."""
        return self.images.labels()

    def image_bytes(self, record: Record) -> bytes:
        """Return the PNG of a tile. Raises ValueError for a record of another source."""
        box = BOX.fullmatch(record.image_uri or "")
        if box is None:
            raise ValueError(f"record {record.record_id!r} is not of this source: {record.image_uri}")
        left, top, size = int(box["left"]), int(box["top"]), int(box["size"])
        return encode_image(np.ascontiguousarray(self._pixels(box["image"])[top : top + size, left : left + size]))

    def _tiles(self, image: Record) -> Iterator[Record]:
        if image.image_uri is None:
            raise ImageError("image_missing", "has no image")
        pixels = self._pixels(image.image_uri)
        height, width = pixels.shape[:2]
        size, limit = self.config.tile_size, self.config.max_tiles_per_image
        if min(height, width) < size:
            raise ImageError("image_too_small", f"{image.image_uri}: {width} x {height} pixels, tiles of {size}")
        nuclei = self._measure(image, height, width)
        windows = _grid(height, width, size) if self.config.tiling == "grid" else _around(nuclei, height, width, size)
        if limit is not None and len(windows) > limit:
            rng = random.Random(f"{self.config.seed}:{image.record_id}")
            windows = sorted(rng.sample(windows, limit))
        for top, left in windows:
            measurements = {} if nuclei is None else nuclei.within(top, left, size, size).describe(size * size)
            yield Record(
                record_id=f"{image.record_id}_{top:05d}_{left:05d}",
                group_id=image.group_id,
                label_id=image.label_id,
                split=image.split,
                text=image.text,
                image_uri=f"{image.image_uri}#box={left},{top},{size}",
                fields=image.fields | measurements,
                citations=image.citations,
            )

    def _pixels(self, uri: str) -> Pixels:
        """Return the pixels of an image; the last image is cached, because its tiles are read one after the other."""
        if self._decoded is None or self._decoded[0] != uri:
            config = self.config
            pixels = decode_full_size(read_content(uri, config.max_bytes), uri, config.max_bytes, config.max_pixels)
            self._decoded = (uri, pixels)
        return self._decoded[1]

    def _measure(self, image: Record, height: int, width: int) -> Nuclei | None:
        """Return the nuclei; None without masks and contours. Raises OutlinesError if they cannot be measured."""
        if self.config.masks is None and self.config.contours is None:
            return None
        instances = self._instances(image.record_id, height, width)
        if instances.shape != (height, width):
            raise OutlinesError(
                "mask_size",
                f"the mask has {instances.shape[1]} x {instances.shape[0]} pixels, the image {width} x {height}",
            )
        return measure(instances)

    def _instances(self, image_id: str, height: int, width: int) -> Instances:
        uris = {
            kind: storage.absolute(template.replace("{}", image_id))
            for kind, template in (("contours", self.config.contours), ("masks", self.config.masks))
            if template is not None
        }
        if ".." in image_id.split("/"):
            raise OutlinesError("no_outlines", f"{image_id!r} is outside the folder")
        for kind, uri in uris.items():
            if storage.exists(uri):
                content = _read_unpacked(uri, self.config.max_bytes)
                if kind == "contours":
                    return read_contours(content, uri, height, width)
                return read_mask(content, uri, self.config.max_pixels)
        raise OutlinesError("no_outlines", f"no file {' or '.join(uris.values())}")


def _grid(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Return the (top, left) corners of adjacent tiles."""
    return [(top, left) for top in range(0, height - size + 1, size) for left in range(0, width - size + 1, size)]


def _around(nuclei: Nuclei | None, height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Return the (top, left) corners of the crops around nuclei that lie inside the image."""
    if nuclei is None:
        return []
    corners = {
        (round(row - size / 2), round(column - size / 2)) for row, column in zip(nuclei.row, nuclei.column, strict=True)
    }
    return sorted((top, left) for top, left in corners if 0 <= top <= height - size and 0 <= left <= width - size)


def _read_unpacked(uri: str, max_bytes: int) -> bytes:
    size = storage.size(uri)
    if size is None or size > max_bytes:
        raise OutlinesError("outlines_too_large", f"{uri}: {size} bytes, the maximum is {max_bytes:,}")
    if not uri.endswith(".gz"):
        return storage.read_bytes(uri)
    try:
        with storage.open_input(uri) as stream, gzip.GzipFile(fileobj=stream) as plain:
            return plain.read(MAX_CONTOUR_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise OutlinesError("contours_unreadable", f"{uri}: {one_line(error)}") from error
