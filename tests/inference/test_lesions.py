"""Areas, diameters and contours of drawn shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.inference import lesions
from mgcc_dist.inference.lesions import describe, find_lesions

SIDES = st.floats(1.5, 6.0)  # mm
SPACINGS = st.floats(0.05, 0.3)


@settings(max_examples=60, deadline=None)
@given(a=SIDES, b=SIDES, angle=st.floats(0, np.pi), x_mm=SPACINGS, y_mm=SPACINGS)
def test_an_ellipse_has_its_area_and_diameters_whatever_the_spacing(a, b, angle, x_mm, y_mm):
    """To a pixel: the mask holds the pixels whose centre lies in the ellipse."""
    long, short = max(a, b), min(a, b)
    height, width = int(2 * long / y_mm) + 7, int(2 * long / x_mm) + 7
    rows, columns = np.mgrid[:height, :width] + 0.5
    x, y = (columns - width / 2) * x_mm, (rows - height / 2) * y_mm
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    mask = (along / long) ** 2 + (across / short) ** 2 <= 1
    (lesion,) = find_lesions(mask, (x_mm, y_mm), (10, 20))
    pixel = np.hypot(x_mm, y_mm)
    assert lesion.longest == pytest.approx(2 * long, abs=pixel)
    assert lesion.perpendicular == pytest.approx(2 * short, abs=pixel)
    assert describe(lesion, (x_mm, y_mm))["area_mm2"] == pytest.approx(mask.sum() * x_mm * y_mm, abs=1e-3)
    assert mask.sum() * x_mm * y_mm == pytest.approx(np.pi * a * b, abs=2 * np.pi * long * pixel / 4)
    ends = (np.array(lesion.longest_line) - (10, 20)) * (x_mm, y_mm)
    assert np.hypot(*(ends[1] - ends[0])) == pytest.approx(lesion.longest)


def test_lesions_are_sorted_by_area_and_holes_are_contours():
    mask = np.zeros((30, 40), np.uint8)
    mask[1:4, 1:4] = 255
    mask[10:25, 10:30] = 255
    mask[14:20, 14:20] = 0
    large, small = find_lesions(mask, None)
    assert (large.area_pixels, small.area_pixels) == (15 * 20 - 36, 9)
    assert len(large.contours) == 2
    assert large.longest == pytest.approx(np.hypot(15, 20), abs=1)
    assert set(describe(small, None)) >= {"area_pixels", "longest_diameter_pixels"}
    assert [lesion.area_pixels for lesion in find_lesions(mask, None, most=1)] == [large.area_pixels]
    assert find_lesions(np.zeros((4, 5)), None) == []


def test_one_pixel_has_a_diameter_of_one_pixel():
    (lesion,) = find_lesions(np.eye(1), (0.5, 0.25), (3, 4))
    assert (lesion.longest, lesion.perpendicular) == (0.5, 0.25)
    assert lesion.longest_line == ((3.0, 4.5), (4.0, 4.5))


def test_pixels_of_any_plausible_shape_have_diameters():
    (lesion,) = find_lesions(np.ones((3, 4)), (1e-5, 1e3))
    assert lesion.longest == pytest.approx(3e3)
    assert lesion.perpendicular == pytest.approx(4e-5)


def test_large_masks_are_measured_on_fewer_pixels(monkeypatch):
    mask = np.zeros((300, 400))
    mask[50:200, 100:350] = 1
    (exact,) = find_lesions(mask, None)
    monkeypatch.setattr(lesions, "MAX_PIXELS", 5000)
    (coarse,) = find_lesions(mask, None)
    assert len(coarse.contours[0]) < len(exact.contours[0]) / 2
    assert coarse.longest == pytest.approx(exact.longest, rel=0.02)
    assert coarse.area_pixels == pytest.approx(exact.area_pixels, rel=0.05)
