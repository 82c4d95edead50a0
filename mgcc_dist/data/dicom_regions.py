"""The two-dimensional regions of a DICOM image, and its pixel size (Sequence of Ultrasound Regions, Pixel Spacing)."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

Spacing = tuple[float, float]
"""millimetres per pixel, along x (columns) and y (rows)"""
PLAUSIBLE = (1e-5, 1e3)
"""least and most millimetres that a pixel can measure"""
TWO_DIMENSIONAL, TISSUE, CENTIMETRES = 1, 1, 3  # Region Spatial Format, Region Data Type, Physical Units


class Region(NamedTuple):
    """A part of an image that shows tissue."""

    rows: slice
    columns: slice
    spacing: Spacing | None
    """None if unknown"""


Box = tuple[tuple[int, int], tuple[int, int], Spacing | None]


def find_regions(dataset: Any, height: int, width: int) -> tuple[Region, ...]:
    """Return the two-dimensional regions without those inside another one, such as the box of a colour Doppler."""
    found: dict[int, list[Region]] = {}
    for item in dataset.get("SequenceOfUltrasoundRegions") or ():
        if int(value_of(item, "RegionSpatialFormat", 0)) != TWO_DIMENSIONAL:
            continue
        top, bottom, left, right = (
            int(value_of(item, f"RegionLocation{name}", -1)) for name in ("MinY0", "MaxY1", "MinX0", "MaxX1")
        )
        rows, columns = _range(top, bottom, height), _range(left, right, width)
        if rows and columns:
            kind = int(value_of(item, "RegionDataType", TISSUE))
            found.setdefault(kind, []).append(Region(rows, columns, _region_spacing(item)))
    chosen = found.get(TISSUE) or [each for kind in found.values() for each in kind]
    regions = list(dict.fromkeys(map(_hashable, chosen)))
    outermost = [each for each in regions if not any(other != each and _contains(other, each) for other in regions)]
    if outermost:
        return tuple(Region(slice(*top), slice(*left), spacing) for top, left, spacing in outermost)
    spacing = dataset.get("PixelSpacing")  # between rows, then between columns
    sides = [float(side) for side in np.atleast_1d(spacing)] if spacing is not None else []
    known = len(sides) == 2 and is_plausible(sides)
    return (Region(slice(0, height), slice(0, width), (sides[1], sides[0]) if known else None),)


def is_plausible(spacing: Iterable[float]) -> bool:
    """Return whether these can be millimetres per pixel."""
    return all(PLAUSIBLE[0] <= side <= PLAUSIBLE[1] for side in spacing)


def value_of(dataset: Any, name: str, default: Any) -> Any:
    """Return an attribute; `default` if it is missing or empty."""
    value = dataset.get(name)
    return default if value is None or value == "" else value


def _hashable(region: Region) -> Box:
    return (region.rows.start, region.rows.stop), (region.columns.start, region.columns.stop), region.spacing


def _contains(outer: Box, inner: Box) -> bool:
    """Of two equal boxes with different spacing, neither contains the other."""
    inside = all(o[0] <= i[0] and i[1] <= o[1] for o, i in zip(outer[:2], inner[:2], strict=True))
    return inside and outer[:2] != inner[:2]


def _range(first: int, last: int, length: int) -> slice | None:
    """Return the pixels from `first` to `last`, both included, that lie in the image."""
    start, stop = max(first, 0), min(last + 1, length)
    return slice(start, stop) if first >= 0 and stop > start else None


def _region_spacing(item: Any) -> Spacing | None:
    """Return millimetres per pixel, if both axes are in centimetres."""
    units = [item.get(f"PhysicalUnits{axis}Direction") for axis in "XY"]
    deltas = [abs(float(value_of(item, f"PhysicalDelta{axis}", 0))) * 10 for axis in "XY"]
    if units == [CENTIMETRES, CENTIMETRES] and is_plausible(deltas):
        return deltas[0], deltas[1]
    return None
