"""Read the folds of PanNuke (arXiv 2003.10778) as they are published: arrays of patches, masks and tissues."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.images import ImageError, encode_image
from mint_ray.records import Record, Split
from mint_ray.sources import BadRow
from mint_ray.sources.config import PanNuke
from mint_ray.sources.nuclei import join_nuclei, measure

IMAGES, TYPES, MASKS = "images.npy", "types.npy", "masks.npy"
KINDS = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
"""Nuclei of each of the first channels of a mask; the sixth is the background."""


class PanNukeSource:
    """One record per patch. The folds name no patients, so that each patch is its own group."""

    def __init__(self, config: PanNuke) -> None:
        self.config = config
        if "://" in config.uri:
            raise UserError(f"{config.uri}: arrays are mapped from a disk; copy the folds to this machine")
        self.sizes = storage.file_sizes(config.uri)
        self.folds = {fold: Fold(fold, self._find(fold)) for fold in config.folds}

    def inputs(self) -> dict[str, str]:
        # names, sizes and tissues: to read forty gigabytes before the first patch would take as long as the run
        digest = hashlib.sha256()
        for fold in self.folds.values():
            for name, place in sorted(fold.places.items()):
                digest.update(f"{fold.name}/{name}\t{self.sizes[place]}\n".encode())
            digest.update(storage.sha256(fold.places[TYPES]).encode())
        return {self.config.uri: digest.hexdigest()}

    def read(self) -> Iterator[Record | BadRow]:
        for name, fold in self.folds.items():
            fold.check()
            split: Split = self.config.folds[name]
            for row, tissue in enumerate(fold.types):
                where = f"{fold.places[TYPES]}:{row}"
                if not str(tissue).strip():
                    yield BadRow(where, "no_label", f"{where}: names no tissue")
                    continue
                fields: dict[str, str] = {}
                if self.config.nuclei:
                    mask_HWC = np.asarray(fold.masks[row])
                    if not np.isfinite(mask_HWC).all():
                        where = f"{fold.places[MASKS]}:{row}"
                        yield BadRow(where, "mask_unreadable", f"{where}: holds what is no number")
                        continue
                    fields = describe_patch(mask_HWC)
                record_id = f"{name}_{row:05d}"
                yield Record(
                    record_id=record_id,
                    group_id=record_id,
                    label_id=str(tissue).strip(),
                    split=split,
                    image_uri=f"{fold.places[IMAGES]}#row={row}",
                    fields=fields,
                )

    def labels(self) -> dict[str, list[str]]:
        found = {str(tissue).strip() for fold in self.folds.values() for tissue in fold.types}
        return {tissue: [tissue] for tissue in sorted(found) if tissue}

    def draw(self, record: Record) -> bytes:
        """PNG of a patch."""
        name, _, row = record.record_id.rpartition("_")
        fold = self.folds[name]
        pixels = np.asarray(fold.images[int(row)])
        # published as floating-point numbers, all of them whole
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 255):
            raise ImageError(
                "image_out_of_range", f"{fold.places[IMAGES]}:{int(row)}: expected colours of 0 to 255, got others"
            )
        return encode_image(pixels.astype(np.uint8))

    def _find(self, fold: str) -> dict[str, str]:
        """Where each array of the fold lies."""
        found: dict[str, str] = {}
        for place in self.sizes:
            above, _, name = place.rpartition("/")
            if above.rpartition("/")[2] == fold and name in (IMAGES, TYPES, MASKS):
                if name in found:
                    raise UserError(f"{self.config.uri}: {fold}/{name} is there twice: {found[name]} and {place}")
                found[name] = place
        for name in (IMAGES, TYPES, *([MASKS] if self.config.nuclei else [])):
            if name not in found:
                raise UserError(f"{self.config.uri}: folds: no {fold}/{name}, at whatever depth")
        return found


class Fold:
    """The arrays of one fold, mapped when they are first asked for."""

    def __init__(self, name: str, places: dict[str, str]) -> None:
        self.name, self.places = name, places

    @functools.cached_property
    def images(self) -> NDArray[Any]:
        return _map(self.places[IMAGES])

    @functools.cached_property
    def masks(self) -> NDArray[Any]:
        return _map(self.places[MASKS])

    @functools.cached_property
    def types(self) -> NDArray[Any]:
        types = _map(self.places[TYPES])
        if types.ndim != 1 or types.dtype.kind != "U":
            raise UserError(f"{self.places[TYPES]}: expected one text a patch, got {types.dtype} of {types.shape}")
        return types

    def check(self) -> None:
        """Raise UserError, naming both, for arrays that do not fit together."""
        images = self.images
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype.kind not in "uif":
            raise UserError(f"{self.places[IMAGES]}: expected (N, height, width, 3), got {images.dtype} {images.shape}")
        if len(self.types) != len(images):
            raise UserError(
                f"{self.places[TYPES]}: {len(self.types):,} tissues for the {len(images):,} patches of {IMAGES}"
            )
        if MASKS in self.places and self.masks.shape != (*images.shape[:3], len(KINDS) + 1):
            raise UserError(
                f"{self.places[MASKS]}: masks of {self.masks.shape} do not match the patches of "
                f"{self.places[IMAGES]}, which are {images.shape}; expected {(*images.shape[:3], len(KINDS) + 1)}"
            )


def describe_patch(mask_HWC: NDArray[Any]) -> dict[str, str]:
    """Coded fields of a patch: what its nuclei measure, and how many there are of each kind."""
    kinds = [measure(mask_HWC[..., channel].astype(np.int32)) for channel in range(len(KINDS))]
    counts = {kind: str(len(nuclei)) for kind, nuclei in zip(KINDS, kinds, strict=True)}
    return join_nuclei(kinds).describe(mask_HWC.shape[0] * mask_HWC.shape[1]) | counts


def _map(place: str) -> NDArray[Any]:
    try:
        mapped: NDArray[Any] = np.load(place, mmap_mode="r", allow_pickle=False)
        return mapped
    except ValueError as error:
        if "object" in str(error).lower() or "pickle" in str(error).lower():
            raise UserError(
                f"{place}: holds Python objects, which only unpickling reads and nothing here unpickles; if you trust "
                'it: python -c "import numpy, sys; p = sys.argv[1]; numpy.save(p, numpy.load(p, '
                f'allow_pickle=True).astype(str))" {place}'
            ) from error
        raise UserError(f"{place}: no array of numpy: {' '.join(str(error).split())}") from error
    except (OSError, EOFError) as error:
        raise UserError(f"{place}: cannot be read: {' '.join(str(error).split())}") from error
