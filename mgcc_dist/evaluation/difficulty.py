"""Choose images for a figure by how hard they are to segment, judged from image and ground truth only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RULE = (
    "Chosen from image and ground truth only, each image once, in this order: the lesion with the lowest contrast "
    "(mean inside minus mean of a surrounding ring), with the least clear boundary (mean gradient along the contour of "
    "the smoothed image), the largest, the smallest, and of the images without lesion the one of median brightness."
)
RING, SMOOTHING = 0.08, 0.01
"""width of the ring and standard deviation of the smoothing, as shares of the image's shorter side"""


@dataclass(frozen=True)
class Difficulty:
    """What the choice depends on. Without a lesion, all but `brightness` are 0."""

    key: str
    lesion_area: float
    """share of the image"""
    contrast: float
    boundary: float
    brightness: float


def measure(key: str, image: np.ndarray, truth: np.ndarray) -> Difficulty:
    """Measure an image uint8 [H,W] with its ground truth bool [H,W]."""
    from scipy.ndimage import binary_dilation, binary_erosion, gaussian_gradient_magnitude

    pixels = image.astype(np.float64) / 255
    if not truth.any():
        return Difficulty(key, 0.0, 0.0, 0.0, float(pixels.mean()))
    side = min(truth.shape)
    around = binary_dilation(truth, iterations=max(1, round(RING * side))) & ~truth
    contrast = abs(pixels[truth].mean() - pixels[around].mean()) if around.any() else 0.0
    edge = truth & ~binary_erosion(truth)
    gradient = gaussian_gradient_magnitude(pixels, max(1.0, SMOOTHING * side))
    return Difficulty(key, float(truth.mean()), float(contrast), float(gradient[edge].mean()), float(pixels.mean()))


def choose(images: Sequence[Difficulty]) -> list[tuple[str, str]]:
    """Return (why, key) of up to five images by RULE."""
    lesions = sorted((each for each in images if each.lesion_area), key=lambda each: each.key)
    normals = sorted((each for each in images if not each.lesion_area), key=lambda each: (each.brightness, each.key))
    chosen: dict[str, str] = {}
    for why, difficulty in (
        ("lowest contrast", lambda each: each.contrast),
        ("unclear boundary", lambda each: each.boundary),
        ("largest lesion", lambda each: -each.lesion_area),
        ("smallest lesion", lambda each: each.lesion_area),
    ):
        if left := [each for each in lesions if each.key not in chosen]:
            chosen[min(left, key=difficulty).key] = why
    if normals:
        chosen[normals[(len(normals) - 1) // 2].key] = "no lesion"
    return [(why, key) for key, why in chosen.items()]
