"""Read records from images that lie in folders named by their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from mint_ray import storage
from mint_ray.records import Record
from mint_ray.sources import BadRow, find_group
from mint_ray.sources.config import ImageFolder

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")


class ImageFolderSource:
    """One record per image, called by its path below the folder; what is in it is found out when it is looked at."""

    def __init__(self, config: ImageFolder) -> None:
        self.config = config
        self.sizes = storage.file_sizes(config.uri)
        below = len(storage.absolute(config.uri)) + 1
        self.names = {storage.absolute(uri): storage.absolute(uri)[below:] for uri in self.sizes}

    def inputs(self) -> dict[str, str]:
        # names and sizes: to read every image before the first is needed would take as long as the run
        digest = hashlib.sha256()
        for name, size in zip(self.names.values(), self.sizes.values(), strict=True):
            digest.update(f"{name}\t{size}\n".encode())
        return {self.config.uri: digest.hexdigest()}

    def read(self) -> Iterator[Record | BadRow]:
        for uri, name in self.names.items():
            label, slash, rest = name.partition("/")
            if name.rpartition("/")[2].startswith("."):
                continue  # what file systems leave behind
            if not slash:
                yield BadRow(uri, "no_label", f"{uri}: lies in no folder that would name its label")
            elif not name.lower().endswith(SUFFIXES):
                yield BadRow(uri, "no_image", f"{uri}: expected a name ending in {', '.join(SUFFIXES)}")
            elif (group := self._group(rest)) is None:
                yield BadRow(uri, "no_group", f"{uri}: {self.config.group!r} finds no group in its name")
            else:
                yield Record(record_id=name, group_id=group or name, label_id=label, image_uri=uri)

    def labels(self) -> dict[str, list[str]]:
        folders = {name.partition("/")[0] for name in self.names.values() if "/" in name}
        return {folder: [folder] for folder in sorted(folders)}

    def _group(self, path: str) -> str | None:
        """An empty text where the image is to be its own group; None where none is found."""
        if self.config.group is None:
            return ""
        return find_group(self.config.group, path.rpartition("/")[2])
