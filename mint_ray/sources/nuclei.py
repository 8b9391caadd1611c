"""Measure nuclei: from masks or drawn contours to centres, areas and shapes, and to a few numbers for a window.

Area, axes and eccentricity are those of the ellipse with the second moments of the nucleus, as scikit-image's
`regionprops` has them. They are sums over pixels, which numpy's bincount makes of all nuclei at once: no library is
needed beside scipy, which is here already and labels the components.
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

Instances = NDArray[np.int32]
"""(height, width): 0 where there is no nucleus, otherwise the number of the one that is there."""
Numbers = NDArray[np.float64]

MOST_CONTOUR_BYTES = 64 << 20
TOUCHING = np.ones((3, 3), dtype=int)
"""Pixels that meet at a corner are of one nucleus."""


class OutlinesError(ValueError):
    """Why a mask or contours are of no use; `reason` is counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nuclei:
    """N nuclei of one picture, in pixels; one entry each, in every array."""

    row: Numbers
    column: Numbers
    area: Numbers
    eccentricity: Numbers
    """0 for a circle, towards 1 for a line."""
    major: Numbers
    """Length of the longer axis."""

    def __len__(self) -> int:
        return len(self.area)

    def within(self, top: float, left: float, height: float, width: float) -> Nuclei:
        """Those whose centres lie in a window."""
        inside = (self.row >= top) & (self.row < top + height) & (self.column >= left) & (self.column < left + width)
        return Nuclei(**{field.name: getattr(self, field.name)[inside] for field in dataclasses.fields(self)})

    def describe(self, window_area: float) -> dict[str, str]:
        """Coded fields of a window of so many pixels that holds these nuclei; a mean of none is left out."""
        numbers = {"nucleus_cover": float(self.area.sum()) / window_area}
        if len(self):
            numbers |= {
                "nucleus_area": float(self.area.mean()),
                "nucleus_area_sd": float(self.area.std()),
                "nucleus_eccentricity": float(self.eccentricity.mean()),
                "nucleus_eccentricity_sd": float(self.eccentricity.std()),
                "nucleus_length": float(self.major.mean()),
            }
        if len(self) > 1:
            centres = np.column_stack([self.row, self.column])
            nearest, _ = cKDTree(centres).query(centres, k=2)
            numbers["nucleus_spacing"] = float(nearest[:, 1].mean())
        return {"nuclei": str(len(self)), **{name: f"{number:.4g}" for name, number in numbers.items()}}


def measure(instances: Instances) -> Nuclei:
    """Every nucleus of a picture, in the order of their numbers."""
    rows, columns = np.nonzero(instances)
    _, which = np.unique(instances[rows, columns], return_inverse=True)
    count = int(which.max(initial=-1)) + 1
    area = np.bincount(which, minlength=count).astype(np.float64)
    row, column = (np.bincount(which, places, count) / area for places in (rows, columns))
    down, right = rows - row[which], columns - column[which]
    # a pixel is a square and no point: a twelfth is its own moment
    rr, cc, rc = (
        np.bincount(which, product, count) / area + own
        for product, own in ((down * down, 1 / 12), (right * right, 1 / 12), (down * right, 0.0))
    )
    half, apart = (rr + cc) / 2, np.hypot((rr - cc) / 2, rc)
    long, short = half + apart, half - apart
    return Nuclei(row=row, column=column, area=area, eccentricity=np.sqrt(1 - short / long), major=4 * np.sqrt(long))


def join_nuclei(parts: list[Nuclei]) -> Nuclei:
    """All of them."""
    names = [field.name for field in dataclasses.fields(Nuclei)]
    return Nuclei(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def read_mask(content: bytes, name: str, max_pixels: int) -> Instances:
    """Nuclei of a PNG or TIFF, or of an array as numpy saves it: numbers of nuclei, or of two values components.

    Raises OutlinesError for what is no such mask; nothing is unpickled.
    """
    try:
        if name.endswith(".npy"):
            values: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            image = Image.open(io.BytesIO(content), formats=("PNG", "TIFF"))
            if image.size[0] * image.size[1] > max_pixels:
                raise OutlinesError("mask_too_large", f"{name}: {image.size}, at most {max_pixels:,} pixels")
            values = np.asarray(image)
    except OutlinesError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise OutlinesError("mask_unreadable", f"{name}: {' '.join(str(error).split())}") from error
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise OutlinesError(
            "mask_unreadable", f"{name}: expected whole numbers, one a pixel, got {values.dtype} of {values.shape}"
        )
    return number(values)


def number(values: NDArray[Any]) -> Instances:
    """An array of nuclei's numbers as it is; of a mask that only says where nuclei are, its components numbered."""
    if np.count_nonzero(np.unique(values)) > 1:
        return values.astype(np.int32)
    components, _ = label(values != 0, structure=TOUCHING)
    numbered: Instances = components.astype(np.int32)
    return numbered


def read_contours(content: bytes, name: str, height: int, width: int) -> Instances:
    """Nuclei drawn from the regions of an Aperio ImageScope XML; where two overlap, the later one lies on top.

    Raises OutlinesError for what is no such file, and for contours that lie outside the picture.
    """
    if len(content) > MOST_CONTOUR_BYTES:
        raise OutlinesError("contours_too_large", f"{name}: more than {MOST_CONTOUR_BYTES:,} bytes")
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        # what expands entities can be made to fill the memory
        raise OutlinesError("contours_unreadable", f"{name}: declares a document type, which none of these has")
    try:
        root = ElementTree.fromstring(content)  # noqa: S314 -- without entities, which were refused above
        outlines = [
            [(float(vertex.attrib["X"]), float(vertex.attrib["Y"])) for vertex in region.iter("Vertex")]
            for region in root.iter("Region")
        ]
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise OutlinesError("contours_unreadable", f"{name}: no contours of ImageScope: {error!r}") from error
    outlines = [outline for outline in outlines if len(outline) > 2]
    if not outlines:
        raise OutlinesError("no_contours", f"{name}: holds no region of three points or more")
    most_x, most_y = (max(point[axis] for outline in outlines for point in outline) for axis in (0, 1))
    # annotators draw a little over the edge
    if most_x > 1.05 * width or most_y > 1.05 * height:
        raise OutlinesError(
            "contours_outside", f"{name}: reaches to ({most_x:g}, {most_y:g}); the picture is {width} x {height}"
        )
    drawn = Image.new("I", (width, height))
    pen = ImageDraw.Draw(drawn)
    for place, outline in enumerate(outlines, start=1):
        pen.polygon(outline, fill=place)
    return np.asarray(drawn, dtype=np.int32)
