"""Measurements of nuclei, from masks or contours: centres, areas and shapes, summarized for a window.

Area, axes and eccentricity are those of the ellipse with the same second moments as the nucleus, as scikit-image's
`regionprops` defines them. They are sums over pixels, which numpy's bincount computes for all nuclei at once, so no
dependency besides scipy (labels of the components) is needed.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import label
from scipy.spatial import cKDTree

from mint_ray.config.loader import one_line

Instances = NDArray[np.int32]
"""(height, width): the number of the nucleus at each pixel, 0 for background."""
Floats = NDArray[np.float64]

MAX_CONTOUR_BYTES = 64 << 20
"""Maximum size of a contour file, unpacked."""
NEIGHBOURS = np.ones((3, 3), dtype=int)
"""Connectivity of components: pixels that share a corner belong together."""


class OutlinesError(ValueError):
    """A mask or contours that cannot be used; rows are counted by `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nuclei:
    """N nuclei of one image, in pixels; every array has shape (N,)."""

    row: Floats
    """Row of the centre."""
    column: Floats
    """Column of the centre."""
    area: Floats
    eccentricity: Floats
    """0 for a circle, approaching 1 for a line."""
    major_axis: Floats
    """Length of the major axis."""

    def __len__(self) -> int:
        return len(self.area)

    def within(self, top: float, left: float, height: float, width: float) -> Nuclei:
        """Return the nuclei whose centres lie in a window."""
        inside = (self.row >= top) & (self.row < top + height) & (self.column >= left) & (self.column < left + width)
        return Nuclei(**{field.name: getattr(self, field.name)[inside] for field in dataclasses.fields(self)})

    def describe(self, window_area: float) -> dict[str, str]:
        """Return coded fields of a window of `window_area` pixels with these nuclei; a mean over none is left out."""
        numbers = {"nucleus_cover": float(self.area.sum()) / window_area}
        if len(self):
            numbers |= {
                "nucleus_area": float(self.area.mean()),
                "nucleus_area_sd": float(self.area.std()),
                "nucleus_eccentricity": float(self.eccentricity.mean()),
                "nucleus_eccentricity_sd": float(self.eccentricity.std()),
                "nucleus_length": float(self.major_axis.mean()),
            }
        if len(self) > 1:
            centres = np.column_stack([self.row, self.column])
            distances, _ = cKDTree(centres).query(centres, k=2)
            numbers["nucleus_spacing"] = float(distances[:, 1].mean())
        return {"nuclei": str(len(self)), **{name: f"{number:.4g}" for name, number in numbers.items()}}


def measure(instances: Instances) -> Nuclei:
    """Return the measurements of every nucleus of an image, in the order of their numbers."""
    rows, columns = np.nonzero(instances)
    _, nucleus = np.unique(instances[rows, columns], return_inverse=True)
    count = int(nucleus.max(initial=-1)) + 1
    area = np.bincount(nucleus, minlength=count).astype(np.float64)
    row, column = (np.bincount(nucleus, places, count) / area for places in (rows, columns))
    down, right = rows - row[nucleus], columns - column[nucleus]
    # a pixel is a square, not a point: it has a second moment of 1/12 itself
    rr, cc, rc = (
        np.bincount(nucleus, product, count) / area + own
        for product, own in ((down * down, 1 / 12), (right * right, 1 / 12), (down * right, 0.0))
    )
    mean, deviation = (rr + cc) / 2, np.hypot((rr - cc) / 2, rc)
    long, short = mean + deviation, mean - deviation
    return Nuclei(
        row=row, column=column, area=area, eccentricity=np.sqrt(1 - short / long), major_axis=4 * np.sqrt(long)
    )


def concatenate(parts: list[Nuclei]) -> Nuclei:
    """Return the nuclei of all parts."""
    names = [field.name for field in dataclasses.fields(Nuclei)]
    return Nuclei(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def read_mask(content: bytes, name: str, max_pixels: int) -> Instances:
    """Return the nuclei of a PNG, TIFF or `.npy` mask: numbered, or as the components of a binary mask.

    Raises OutlinesError if it is no such mask; nothing is unpickled.
    """
    try:
        if name.endswith(".npy"):
            values: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            image = Image.open(io.BytesIO(content), formats=("PNG", "TIFF"))
            if image.size[0] * image.size[1] > max_pixels:
                raise OutlinesError("mask_too_large", f"{name}: {image.size}, the maximum is {max_pixels:,} pixels")
            values = np.asarray(image)
    except OutlinesError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise OutlinesError("mask_unreadable", f"{name}: {one_line(error)}") from error
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise OutlinesError(
            "mask_unreadable", f"{name}: expected one integer per pixel, got {values.dtype} of shape {values.shape}"
        )
    return number_instances(values)


def number_instances(values: NDArray[Any]) -> Instances:
    """Return an array of nucleus numbers unchanged, and the numbered components of a binary mask."""
    if np.count_nonzero(np.unique(values)) > 1:
        return values.astype(np.int32)
    components, _ = label(values != 0, structure=NEIGHBOURS)
    instances: Instances = components.astype(np.int32)
    return instances


def read_contours(content: bytes, name: str, height: int, width: int) -> Instances:
    """Return the nuclei drawn from the regions of an Aperio ImageScope XML; a later region covers an earlier one.

    Raises OutlinesError if it is no such file, and for contours outside the image.
    """
    outlines = _parse_contours(content, name)
    max_x, max_y = (max(point[axis] for outline in outlines for point in outline) for axis in (0, 1))
    # annotators draw slightly over the edge
    if max_x > 1.05 * width or max_y > 1.05 * height:
        raise OutlinesError(
            "contours_outside", f"{name}: extends to ({max_x:g}, {max_y:g}); the image is {width} x {height}"
        )
    canvas = Image.new("I", (width, height))
    draw = ImageDraw.Draw(canvas)
    for number, outline in enumerate(outlines, start=1):
        draw.polygon(outline, fill=number)
    return np.asarray(canvas, dtype=np.int32)


def _parse_contours(content: bytes, name: str) -> list[list[tuple[float, float]]]:
    """Return the (x, y) points of each region with at least three."""
    if len(content) > MAX_CONTOUR_BYTES:
        raise OutlinesError("contours_too_large", f"{name}: more than {MAX_CONTOUR_BYTES:,} bytes")
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        # entity expansion can exhaust the memory
        raise OutlinesError("contours_unreadable", f"{name}: declares a document type, which contours never do")
    try:
        root = ElementTree.fromstring(content)  # noqa: S314 -- without entities, which were refused above
        outlines = [
            [(float(vertex.attrib["X"]), float(vertex.attrib["Y"])) for vertex in region.iter("Vertex")]
            for region in root.iter("Region")
        ]
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise OutlinesError("contours_unreadable", f"{name}: not contours of ImageScope: {error!r}") from error
    outlines = [outline for outline in outlines if len(outline) > 2]
    if not outlines:
        raise OutlinesError("no_contours", f"{name}: no region with three points or more")
    return outlines
