"""Read mask files as 0 and 255, by their content, whatever their suffix.

- Two values: the higher one is lesion. Of two colours the one that is not black, or not grey, is lesion; of a coloured
  palette the index counts, and 0 is the background.
- Almost two values, as JPEG and smooth resizing leave them: threshold at the midpoint.
- Several values: an error that lists them, unless the caller says which are lesion.
- One visible colour and transparency: the opacity is the mask.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mgcc_dist.data.images import BadFile, deep_colour, load_image

MARGIN = 0.125  # of the range: values this close to one of the two are that one, with artefacts
FLAT = 0.02  # of the range: a 3x3 window with less contrast is the inside of an area
MIN_RANGE = 32  # grey values over a smaller range are label numbers
MAX_LABELS = 32  # more values than this, and smooth resizing explains small flat areas
MAX_AMBIGUOUS = 0.25  # of the pixels: below for 34 BUSI masks enlarged 16 times, above for most ultrasound images
LISTED = 12  # values that an error message lists


@dataclass(frozen=True)
class MaskFacts:
    """How a mask file was read.

    `values`: the two values of an exactly two-valued file, else empty. `ambiguous`: in a file of almost two values,
    the pixels close to neither; None otherwise.
    """

    values: tuple[float, ...] = ()
    ambiguous: int | None = None
    from_opacity: bool = False


def read_mask(
    path: Path, label_values: Collection[int] = (), content: bytes | None = None
) -> tuple[np.ndarray, MaskFacts]:
    """Read a mask as uint8 [H,W] of 0 and 255; with `label_values` exactly these grey values or indices are lesion.

    `content` is that of the file, if it is not on the disk.

    Raises:
        BadFile: not a readable image, or more than two values and no `label_values`.
    """
    image, low_bytes = load_image(path, content)
    try:
        pixels = np.asarray(image) if low_bytes is None else deep_colour(image, low_bytes)
        values, from_opacity = _grey_values(image, pixels)
        if values.ndim == 3 and label_values:
            raise ValueError("is a colour image, and --label-values needs grey values or palette indices")
        if label_values:
            return _as_mask(np.isin(values, list(label_values))), MaskFacts(from_opacity=from_opacity)
        if values.ndim == 3:
            values = _along_two_colours(values)
        levels = np.unique(values).astype(np.float64)
        if len(levels) > 2:
            lesion, ambiguous = _threshold(values, levels)
            return _as_mask(lesion), MaskFacts((), ambiguous, from_opacity)
    except ValueError as error:
        raise BadFile(path, str(error)) from error
    lesion = values > 0 if len(levels) == 1 else values == levels[1]
    return _as_mask(lesion), MaskFacts(tuple(levels.tolist()) if len(levels) == 2 else (), None, from_opacity)


def _as_mask(lesion: np.ndarray) -> np.ndarray:
    return np.where(lesion, 255, 0).astype(np.uint8)


def _grey_values(image: Image.Image, pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return grey values, palette indices or opacities [H,W], or colours [H,W,3]; and whether they are opacities."""
    if image.mode in ("P", "PA"):
        indices = pixels if pixels.ndim == 2 else pixels[:, :, 0]
        used = np.asarray(image.convert("RGBA"))[:, :, :3]
        # Without a lesion only the background is used, and white would pass for a grey mask that is all lesion.
        if not _is_grey(used) or (
            not indices.any() and not _is_grey(np.array(image.getpalette() or []).reshape(-1, 3))
        ):
            return indices, False
    if image.mode == "1":
        return pixels.astype(np.uint8) * 255, False
    if pixels.ndim == 2 and image.mode != "P":
        if not np.isfinite(pixels).all():
            raise ValueError("has pixels that are not finite")
        if not image.has_transparency_data:
            return pixels, False
    if pixels.dtype != np.uint16:
        pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    colour, opacity = pixels[:, :, :3], pixels[:, :, 3:]
    if opacity.size and opacity.min() < opacity.max():
        visible = colour[opacity[:, :, 0] > 0]
        if (visible == visible[0]).all():
            return opacity[:, :, 0], True
        colour = np.rint(colour * (opacity / np.iinfo(pixels.dtype).max)).astype(pixels.dtype)  # onto black
    return (colour[:, :, 0] if _is_grey(colour) else colour), False


def _is_grey(colour: np.ndarray) -> bool:
    return bool((colour[..., :1] == colour).all())


def _along_two_colours(colours: np.ndarray) -> np.ndarray:
    """Return where each pixel of [H,W,3] lies between the two main colours: 0 for background, 255 for lesion.

    Raises:
        ValueError: an area has a third colour.
    """
    pixels = colours.reshape(-1, 3).astype(np.float64)
    distinct, counts = np.unique(pixels, axis=0, return_counts=True)
    first = distinct[counts.argmax()]
    distance = np.linalg.norm(distinct - first, axis=1)
    second = distinct[np.where(distance >= distance.max() / 2, counts, 0).argmax()]
    background, lesion = (second, first) if _is_lesion(first, second) else (first, second)
    axis = lesion - background
    along = (pixels - background) @ axis / (axis @ axis)
    off_axis = np.linalg.norm(pixels - background - along[:, None] * axis, axis=1) / np.linalg.norm(axis)
    shape = colours.shape[:2]
    third = (np.maximum(off_axis, np.abs(along - 0.5) - 0.5) > 0.25).reshape(shape)
    if (_is_flat(np.mean(colours, axis=2), np.ptp(pixels)) & third[1:-1, 1:-1]).any():
        raise ValueError(f"has {len(distinct)} colours. Save it as a grey image of 0 and 255")
    return np.rint(along * 255).clip(0, 255).reshape(shape)


def _is_lesion(colour: np.ndarray, other: np.ndarray) -> bool:
    """Return whether `colour` is lesion and `other` background: lesions are coloured on black, grey or white."""
    saturation, others = np.ptp(colour), np.ptp(other)
    if max(saturation, others) > 2 * min(saturation, others):
        return bool(saturation > others)
    return bool(colour @ (299, 587, 114) > other @ (299, 587, 114))


def _threshold(values: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, int]:
    """Threshold more than two values at the midpoint of the two main ones; also count the pixels close to neither.

    Raises:
        ValueError: the values are labels, or those of an image.
    """
    whole = bool((levels == np.floor(levels)).all())
    centre = (levels[0] + levels[-1]) / 2
    low, high = _most_frequent(values[values <= centre]), _most_frequent(values[values > centre])
    relative = (values.astype(np.float64) - low) / (high - low)
    neither = (np.abs(relative) > MARGIN) & (np.abs(relative - 1) > MARGIN)
    lesion = relative > 0.5
    areas = int((_is_flat(relative, 1.0) & neither[1:-1, 1:-1]).sum())
    few_values = len(levels) <= MAX_LABELS
    if (whole and levels[-1] - levels[0] < MIN_RANGE) or (areas and (few_values or areas > 0.02 * lesion.sum())):
        listed = ", ".join(f"{level:g}" for level in levels[:LISTED].tolist())
        raise ValueError(
            f"has {len(levels)} values, not two: {listed}{', ...' if len(levels) > LISTED else ''}. "
            "Pass --label-values with those that are lesion"
        )
    if neither.mean() > MAX_AMBIGUOUS:
        raise ValueError(
            f"has {neither.mean():.0%} of its pixels close to neither of two values. It looks like an image, not a mask"
        )
    return lesion, int(neither.sum())


def _is_flat(values: np.ndarray, full_range: float) -> np.ndarray:
    """Return for each inner pixel of [H,W] whether its 3x3 window has almost no contrast: bool [H-2,W-2]."""
    if min(values.shape) < 3:
        return np.zeros((max(values.shape[0] - 2, 0), max(values.shape[1] - 2, 0)), np.bool_)
    windows = np.lib.stride_tricks.sliding_window_view(values, (3, 3))
    return np.asarray(windows.max(axis=(2, 3)) - windows.min(axis=(2, 3)) <= FLAT * full_range)


def _most_frequent(values: np.ndarray) -> float:
    levels, counts = np.unique(values, return_counts=True)
    return float(levels[counts.argmax()])
