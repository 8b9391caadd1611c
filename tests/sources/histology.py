"""Synthetic histology images: folds as PanNuke publishes them, and images with outlined nuclei."""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def colour_of(tissue: str) -> NDArray[np.float64]:
    """Return the mean colour of a tissue."""
    return np.random.default_rng(list(tissue.encode())).uniform(40, 215, 3)


def save_fold(
    folder: Path, tissues: Sequence[str], *, size: int = 256, nuclei: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Write `images/foldN/images.npy` and the other two arrays, as in the archive of `foldN` (the folder's name).

    Patch i has `nuclei[i]` nuclei of 4 x 6 pixels, the first one neoplastic and the others inflammatory. Returns the
    patches.
    """
    draw = np.random.default_rng(len(tissues))
    images = np.stack([draw.normal(colour_of(tissue), 20, (size, size, 3)) for tissue in tissues])
    images = np.clip(np.round(images), 0, 255)
    masks = np.zeros((len(tissues), size, size, 6))
    for i in range(len(tissues)):
        for nucleus in range(nuclei[i] if nuclei else 2):
            masks[i, 4:8, 10 * nucleus + 2 : 10 * nucleus + 8, min(nucleus, 1)] = 7 + nucleus
    masks[..., 5] = ~masks[..., :5].any(axis=-1)
    for kind, arrays in (("images", {"images": images, "types": np.array(tissues)}), ("masks", {"masks": masks})):
        place = folder / kind / folder.name
        place.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(place / f"{name}.npy", array)
    return images


def ellipses(height: int, width: int, centres: Sequence[tuple[float, float]], axes: tuple[float, float]) -> NDArray:
    """Return filled ellipses numbered from 1; `axes` are their vertical and horizontal half axes."""
    row, column = np.mgrid[:height, :width]
    drawn = np.zeros((height, width), dtype=np.uint16)
    for number, (y, x) in enumerate(centres, start=1):
        drawn[((row - y) / axes[0]) ** 2 + ((column - x) / axes[1]) ** 2 <= 1] = number
    return drawn


def png(array: NDArray, mode: str | None = None) -> bytes:
    target = io.BytesIO()
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(target, "PNG")
    return target.getvalue()


def aperio(outlines: Sequence[Sequence[tuple[float, float]]]) -> bytes:
    """Return contours as ImageScope saves them, compressed."""
    regions = "".join(
        f'<Region Id="{number}"><Vertices>'
        + "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in outline)
        + "</Vertices></Region>"
        for number, outline in enumerate(outlines, start=1)
    )
    return gzip.compress(f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>".encode())
