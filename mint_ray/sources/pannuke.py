"""Records of the folds of PanNuke (arXiv 2003.10778) as published: arrays of patches, masks and tissues."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mint_ray import storage
from mint_ray.config.loader import UserError, one_line
from mint_ray.images import ImageError, encode_image
from mint_ray.records import Record, Split
from mint_ray.sources import BadRow
from mint_ray.sources.config import PanNuke
from mint_ray.sources.nuclei import concatenate, measure

IMAGES, TYPES, MASKS = "images.npy", "types.npy", "masks.npy"
NUCLEUS_TYPES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
"""Nucleus type of each of the first channels of a mask; the sixth channel is the background."""


class PanNukeSource:
    """One record per patch; each patch is a group, because the folds do not name patients."""

    def __init__(self, config: PanNuke) -> None:
        self.config = config
        if "://" in config.uri:
            raise UserError(f"{config.uri}: arrays are memory-mapped; copy the folds to a local folder")
        self.sizes = storage.file_sizes(config.uri)
        self.folds = {fold: Fold(fold, self._find(fold)) for fold in config.folds}

    def inputs(self) -> dict[str, str]:
        """Return a digest of names, sizes and tissues; hashing 40 GB of images would take as long as a run."""
        digest = hashlib.sha256()
        for fold in self.folds.values():
            for name, path in sorted(fold.paths.items()):
                digest.update(f"{fold.name}/{name}\t{self.sizes[path]}\n".encode())
            digest.update(storage.sha256(fold.paths[TYPES]).encode())
        return {self.config.uri: digest.hexdigest()}

    def read(self) -> Iterator[Record | BadRow]:
        """Yield one row per patch, fold by fold. Raises UserError for arrays whose shapes do not match."""
        for name, fold in self.folds.items():
            fold.check()
            for row, tissue in enumerate(fold.types):
                yield self._record(fold, row, str(tissue).strip(), self.config.folds[name])

    def labels(self) -> dict[str, list[str]]:
        """Return the name of each tissue."""
        found = {str(tissue).strip() for fold in self.folds.values() for tissue in fold.types}
        return {tissue: [tissue] for tissue in sorted(found) if tissue}

    def image_bytes(self, record: Record) -> bytes:
        """Return the PNG of a patch. Raises ImageError for colours outside 0 to 255."""
        name, _, row = record.record_id.rpartition("_")
        fold = self.folds[name]
        pixels = np.asarray(fold.images[int(row)])
        # published as floating-point numbers with integer values
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 255):
            raise ImageError(
                "image_out_of_range", f"{fold.paths[IMAGES]}:{int(row)}: expected colours of 0 to 255, got others"
            )
        return encode_image(pixels.astype(np.uint8))

    def _record(self, fold: Fold, row: int, tissue: str, split: Split) -> Record | BadRow:
        location = f"{fold.paths[TYPES]}:{row}"
        if not tissue:
            return BadRow(location, "no_label", f"{location}: names no tissue")
        fields: dict[str, str] = {}
        if self.config.measure_nuclei:
            mask_HWC = np.asarray(fold.masks[row])
            if not np.isfinite(mask_HWC).all():
                location = f"{fold.paths[MASKS]}:{row}"
                return BadRow(location, "mask_unreadable", f"{location}: contains a value that is not finite")
            fields = describe_patch(mask_HWC)
        record_id = f"{fold.name}_{row:05d}"
        return Record(
            record_id=record_id,
            group_id=record_id,
            label_id=tissue,
            split=split,
            image_uri=f"{fold.paths[IMAGES]}#row={row}",
            fields=fields,
        )

    def _find(self, fold: str) -> dict[str, str]:
        """Return the path of each array of the fold."""
        found: dict[str, str] = {}
        for path in self.sizes:
            folder, _, name = path.rpartition("/")
            if folder.rpartition("/")[2] == fold and name in (IMAGES, TYPES, MASKS):
                if name in found:
                    raise UserError(f"{self.config.uri}: {fold}/{name} exists twice: {found[name]} and {path}")
                found[name] = path
        for name in (IMAGES, TYPES, *([MASKS] if self.config.measure_nuclei else [])):
            if name not in found:
                raise UserError(f"{self.config.uri}: folds: no {fold}/{name} at any depth")
        return found


class Fold:
    """The arrays of one fold, memory-mapped on first access."""

    def __init__(self, name: str, paths: dict[str, str]) -> None:
        self.name, self.paths = name, paths

    @functools.cached_property
    def images(self) -> NDArray[Any]:
        """Patches, shape (N, height, width, 3)."""
        return _map(self.paths[IMAGES])

    @functools.cached_property
    def masks(self) -> NDArray[Any]:
        """Nucleus numbers by type, shape (N, height, width, 6)."""
        return _map(self.paths[MASKS])

    @functools.cached_property
    def types(self) -> NDArray[Any]:
        """Tissues, shape (N,). Raises UserError if they are not texts."""
        types = _map(self.paths[TYPES])
        if types.ndim != 1 or types.dtype.kind != "U":
            raise UserError(
                f"{self.paths[TYPES]}: expected one text per patch, got {types.dtype} of shape {types.shape}"
            )
        return types

    def check(self) -> None:
        """Raise UserError, naming both files, for arrays whose shapes do not match."""
        images = self.images
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype.kind not in "uif":
            raise UserError(f"{self.paths[IMAGES]}: expected (N, height, width, 3), got {images.dtype} {images.shape}")
        if len(self.types) != len(images):
            raise UserError(
                f"{self.paths[TYPES]}: {len(self.types):,} tissues for the {len(images):,} patches of {IMAGES}"
            )
        expected = (*images.shape[:3], len(NUCLEUS_TYPES) + 1)
        if MASKS in self.paths and self.masks.shape != expected:
            raise UserError(
                f"{self.paths[MASKS]}: masks of {self.masks.shape} do not match the patches of {self.paths[IMAGES]}, "
                f"which are {images.shape}; expected {expected}"
            )


def describe_patch(mask_HWC: NDArray[Any]) -> dict[str, str]:
    """Return coded fields of a patch: measurements of its nuclei, and the number of each type."""
    by_type = [measure(mask_HWC[..., channel].astype(np.int32)) for channel in range(len(NUCLEUS_TYPES))]
    counts = {name: str(len(nuclei)) for name, nuclei in zip(NUCLEUS_TYPES, by_type, strict=True)}
    return concatenate(by_type).describe(mask_HWC.shape[0] * mask_HWC.shape[1]) | counts


def _map(path: str) -> NDArray[Any]:
    try:
        mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped
    except ValueError as error:
        if "object" in str(error).lower() or "pickle" in str(error).lower():
            raise UserError(
                f"{path}: contains pickled Python objects, which are never loaded; if you trust the file, convert it: "
                'python -c "import numpy, sys; p = sys.argv[1]; numpy.save(p, numpy.load(p, '
                f'allow_pickle=True).astype(str))" {path}'
            ) from error
        raise UserError(f"{path}: not an array of numpy: {one_line(error)}") from error
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error
