"""Records of images in folders named by their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from mint_ray import storage
from mint_ray.records import Record
from mint_ray.sources import BadRow, find_group
from mint_ray.sources.config import ImageFolder

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")


class ImageFolderSource:
    """One record per image, identified by its path below the folder; images are not opened here."""

    def __init__(self, config: ImageFolder) -> None:
        self.config = config
        self.sizes = storage.file_sizes(config.uri)
        prefix_length = len(storage.absolute(config.uri)) + 1
        self.names = {storage.absolute(uri): storage.absolute(uri)[prefix_length:] for uri in self.sizes}

    def inputs(self) -> dict[str, str]:
        """Return a digest of the names and sizes of all files; hashing every image would take as long as a run."""
        digest = hashlib.sha256()
        for name, size in zip(self.names.values(), self.sizes.values(), strict=True):
            digest.update(f"{name}\t{size}\n".encode())
        return {self.config.uri: digest.hexdigest()}

    def read(self) -> Iterator[Record | BadRow]:
        """Yield one row per file, in the order of the paths; hidden files are skipped."""
        for uri, name in self.names.items():
            label, slash, path = name.partition("/")
            if name.rpartition("/")[2].startswith("."):
                continue  # such as .DS_Store
            if not slash:
                yield BadRow(uri, "no_label", f"{uri}: not in a folder that names its label")
            elif not name.lower().endswith(SUFFIXES):
                yield BadRow(uri, "no_image", f"{uri}: expected a name ending in {', '.join(SUFFIXES)}")
            elif (group := self._group(path)) is None:
                yield BadRow(uri, "no_group", f"{uri}: {self.config.group_pattern!r} finds no group in its name")
            else:
                yield Record(record_id=name, group_id=group or name, label_id=label, image_uri=uri)

    def labels(self) -> dict[str, list[str]]:
        """Return the name of each label, which is that of its folder."""
        folders = {name.partition("/")[0] for name in self.names.values() if "/" in name}
        return {folder: [folder] for folder in sorted(folders)}

    def _group(self, path: str) -> str | None:
        """Return the group of an image; "" if each image is a group, None if the pattern finds none."""
        if self.config.group_pattern is None:
            return ""
        return find_group(self.config.group_pattern, path.rpartition("/")[2])
