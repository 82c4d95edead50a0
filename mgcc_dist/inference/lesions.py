"""Lesions of a mask: area, longest and perpendicular diameter, contours; in millimetres where the spacing is known.

Coordinates are x (along columns) and y (along rows) in pixels, from the top left corner of the image's first pixel,
whose centre is (0.5, 0.5), as in DICOM. The area is that of the mask's pixels. Diameters are those of the convex hull
of the contour, which passes halfway between pixel centres inside and outside: the longest line, and the longest line
perpendicular to it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from contourpy import LineType, contour_generator
from scipy.ndimage import find_objects, label
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist, squareform

from mgcc_dist.data.dicom_regions import Spacing

MAX_PIXELS = 2**22
"""contours of larger masks are drawn on every second, third, ... pixel"""
Line = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Lesion:
    """One connected part of a mask; parts that touch at a corner are connected."""

    area_pixels: int
    longest: float
    """in mm if the spacing is known, else in pixels, as `perpendicular`"""
    perpendicular: float
    longest_line: Line
    """its ends, in pixels"""
    perpendicular_line: Line
    contours: tuple[np.ndarray, ...]
    """outer contour and holes, closed, float [N,2] (x, y) in pixels"""


def find_lesions(
    mask: np.ndarray, spacing: Spacing | None, corner: tuple[int, int] = (0, 0), most: int | None = None
) -> list[Lesion]:
    """Return the lesions of `mask`, an array [H,W] that is 0 outside, the largest first.

    Args:
        spacing: mm per pixel along x and y.
        corner: x and y of the mask's first pixel in the image.
        most: measure only so many.
    """
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return []
    top, left = int(rows[0]), int(columns[0])
    mask = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    step = int(np.ceil(np.sqrt(mask.size / MAX_PIXELS)))
    labels, _ = label(mask[::step, ::step], np.ones((3, 3)))
    origin = np.array([left + corner[0], top + corner[1]], float)
    areas = np.bincount(labels.ravel())[1:] * step**2
    boxes = find_objects(labels)
    lesions = []
    for index in np.argsort(-areas, kind="stable")[:most].tolist():
        rows_and_columns = boxes[index]
        offset = origin + np.array([rows_and_columns[1].start, rows_and_columns[0].start]) * step
        contours = tuple(line * step + offset for line in _contours(labels[rows_and_columns] == index + 1))
        lesions.append(_measure(int(areas[index]), contours, spacing))
    return lesions


def describe(lesion: Lesion, spacing: Spacing | None) -> dict[str, Any]:
    """The JSON object of a lesion, with units in its keys."""
    unit = "mm" if spacing else "pixels"
    entry: dict[str, Any] = {"area_pixels": lesion.area_pixels}
    if spacing:
        entry["area_mm2"] = round(lesion.area_pixels * spacing[0] * spacing[1], 4)
    return entry | {
        f"longest_diameter_{unit}": round(lesion.longest, 4),
        f"perpendicular_diameter_{unit}": round(lesion.perpendicular, 4),
        "longest_diameter_line": np.round(lesion.longest_line, 2).tolist(),
        "perpendicular_diameter_line": np.round(lesion.perpendicular_line, 2).tolist(),
        "contours": [np.round(line, 2).tolist() for line in lesion.contours],
    }


def _contours(part: np.ndarray) -> list[np.ndarray]:
    """Return the closed lines around a bool array [H,W] and its holes."""
    generator = contour_generator(z=np.pad(part, 1).astype(np.float32), line_type=LineType.Separate)
    return [np.asarray(line) - 0.5 for line in generator.lines(0.5)]  # one pixel of padding, half a pixel to its centre


def _measure(area: int, contours: tuple[np.ndarray, ...], spacing: Spacing | None) -> Lesion:
    scale = np.array(spacing or (1.0, 1.0))
    points = np.concatenate(contours)
    hull = points[ConvexHull(points).vertices] * scale  # counterclockwise
    distances = squareform(pdist(hull))
    first, second = np.unravel_index(distances.argmax(), distances.shape)
    longest = float(distances[first, second])
    axis = (hull[second] - hull[first]) / longest
    across = np.array([-axis[1], axis[0]])
    low, high = _widest(hull @ axis, hull @ across)
    return Lesion(
        area,
        longest,
        high[1] - low[1],
        _line(hull[first], hull[second], scale),
        _line(low[0] * axis + low[1] * across, high[0] * axis + high[1] * across, scale),
        contours,
    )


def _widest(along: np.ndarray, across: np.ndarray) -> Line:
    """Return the ends (along, across) of the longest line across a convex polygon; it passes through a corner."""
    follow = (np.roll(along, -1), np.roll(across, -1))
    best: Line = ((0.0, 0.0), (0.0, 0.0))
    for u in along:
        crosses = (np.minimum(along, follow[0]) <= u) & (u <= np.maximum(along, follow[0]))
        run = np.where(along == follow[0], 1.0, follow[0] - along)
        v = (across + (u - along) / run * (follow[1] - across))[crosses]
        ends = np.concatenate([v, across[along == u]])
        if ends.max() - ends.min() > best[1][1] - best[0][1]:
            best = ((float(u), float(ends.min())), (float(u), float(ends.max())))
    return best


def _line(start: np.ndarray, end: np.ndarray, scale: np.ndarray) -> Line:
    (x0, y0), (x1, y1) = (start / scale).tolist(), (end / scale).tolist()
    return (x0, y0), (x1, y1)
