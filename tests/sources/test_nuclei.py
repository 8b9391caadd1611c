"""Measurements of nuclei from masks and contours, against ellipses of known shape and hand computations."""

from __future__ import annotations

import gzip
import io
import math

import numpy as np
import pytest

from mint_ray.sources.nuclei import OutlinesError, measure, number_instances, read_contours, read_mask
from tests.sources.histology import aperio, ellipses, png


def test_the_measures_of_a_large_ellipse_are_those_of_its_axes() -> None:
    nuclei = measure(ellipses(400, 400, [(180.0, 210.0)], (60.0, 90.0)).astype(np.int32))
    assert nuclei.area[0] == pytest.approx(math.pi * 60 * 90, rel=0.002)
    assert nuclei.major_axis[0] == pytest.approx(180, rel=0.002)
    assert nuclei.eccentricity[0] == pytest.approx(math.sqrt(1 - (60 / 90) ** 2), rel=0.005)
    assert (nuclei.row[0], nuclei.column[0]) == pytest.approx((180, 210))


def test_a_nucleus_turned_by_45_degrees_has_the_same_shape() -> None:
    row, column = np.mgrid[:300, :300] - 150.0
    along, across = (row + column) / math.sqrt(2), (row - column) / math.sqrt(2)
    turned = measure((((along / 80) ** 2 + (across / 40) ** 2) <= 1).astype(np.int32))
    straight = measure((((row / 80) ** 2 + (column / 40) ** 2) <= 1).astype(np.int32))
    for name in ("area", "major_axis", "eccentricity"):
        assert getattr(turned, name)[0] == pytest.approx(getattr(straight, name)[0], rel=0.005)


def test_three_pixels_in_a_row_equal_a_hand_computation() -> None:
    mask = np.zeros((5, 6), dtype=np.int32)
    mask[2, 1:4] = 9
    nuclei = measure(mask)
    # columns 1, 2, 3: variance 2/3, and 1/12 of each pixel in both directions
    long, short = 2 / 3 + 1 / 12, 1 / 12
    assert (nuclei.row[0], nuclei.column[0], nuclei.area[0]) == (2.0, 2.0, 3.0)
    assert nuclei.major_axis[0] == pytest.approx(4 * math.sqrt(long))
    assert nuclei.eccentricity[0] == pytest.approx(math.sqrt(1 - short / long))


def test_a_window_is_described_by_the_nuclei_with_their_centre_inside() -> None:
    mask = np.zeros((20, 40), dtype=np.int32)
    mask[2:4, 2:4], mask[2:6, 12:16], mask[12:14, 30:32] = 1, 2, 3
    nuclei = measure(mask)
    described = nuclei.within(0, 0, 20, 20).describe(400)
    assert described["nuclei"] == "2"
    assert float(described["nucleus_area"]) == (4 + 16) / 2
    assert float(described["nucleus_area_sd"]) == 6
    assert float(described["nucleus_cover"]) == 20 / 400
    # centres (2.5, 2.5) and (3.5, 13.5)
    assert float(described["nucleus_spacing"]) == pytest.approx(math.hypot(1, 11), rel=1e-3)
    assert nuclei.within(0, 20, 20, 10).describe(200) == {"nuclei": "0", "nucleus_cover": "0"}
    assert "nucleus_spacing" not in nuclei.within(10, 20, 10, 20).describe(200)


def test_a_binary_mask_is_split_into_components_and_a_numbered_one_is_not() -> None:
    apart = np.zeros((9, 9), dtype=np.uint8)
    apart[1:3, 1:3], apart[3, 3], apart[6:8, 6:8] = 255, 255, 255  # the first two share a corner
    assert len(measure(number_instances(apart))) == 2
    numbered = apart.astype(np.int32)
    numbered[6:8, 6:8] = 3
    numbered[1:3, 1:3] = 3  # one nucleus in two pieces, partly covered by another
    assert len(measure(number_instances(numbered))) == 2
    assert measure(number_instances(numbered)).area.tolist() == [8, 1]


@pytest.mark.parametrize("form", ["bits", "numbers", "array"])
def test_a_mask_is_read_from_a_binary_image_a_numbered_image_and_an_array(form: str) -> None:
    drawn = ellipses(60, 80, [(20, 20), (40, 60)], (6, 9))
    saved = io.BytesIO()
    np.save(saved, drawn)
    content = {"bits": png((drawn > 0).astype(np.uint8) * 255, "1"), "numbers": png(drawn), "array": saved.getvalue()}
    nuclei = measure(read_mask(content[form], "x.npy" if form == "array" else "x.png", 10_000))
    assert nuclei.area.tolist() == measure(drawn.astype(np.int32)).area.tolist()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.png", png(np.zeros((200, 200), np.uint8)), "mask_too_large"),
        ("x.png", png(np.zeros((9, 9, 3), np.uint8)), "mask_unreadable"),
        ("x.png", b"no image", "mask_unreadable"),
        ("x.npy", b"\x80\x04]\x94.", "mask_unreadable"),  # a pickle
    ],
)
def test_other_files_than_masks_are_refused_with_a_reason(name: str, content: bytes, reason: str) -> None:
    with pytest.raises(OutlinesError, match=name) as caught:
        read_mask(content, name, 10_000)
    assert caught.value.reason == reason


def test_contours_that_touch_stay_two_nuclei() -> None:
    left = [(2.0, 2.0), (9.0, 2.0), (9.0, 9.0), (2.0, 9.0)]
    right = [(10.0, 2.0), (17.0, 2.0), (17.0, 9.0), (10.0, 9.0)]
    instances = read_contours(gzip.decompress(aperio([left, right, [(1, 1), (2, 2)]])), "x.xml", 20, 30)
    nuclei = measure(instances)
    assert nuclei.area.tolist() == [64, 64]
    assert nuclei.column.tolist() == [5.5, 13.5]
    assert len(measure(number_instances((instances > 0).astype(np.uint8)))) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<Annotations><Region>", "contours_unreadable"),
        (b"<Annotations/>", "no_contours"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><Annotations/>', "contours_unreadable"),
        (gzip.decompress(aperio([[(0, 0), (900, 0), (900, 900)]])), "contours_outside"),
    ],
)
def test_invalid_contours_and_those_of_another_image_are_refused(content: bytes, reason: str) -> None:
    with pytest.raises(OutlinesError, match=r"x\.xml") as caught:
        read_contours(content, "x.xml", 100, 100)
    assert caught.value.reason == reason
