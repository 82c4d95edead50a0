"""Post-processing of masks: fill holes, drop small components, keep the largest component; in this order.

A setting is written as its words, joined by commas: `fill,min=0.01,largest`, or `none`. `min` is the smallest area that
a component may have, as a share of the image. `choose` finds the setting with the highest mean IoU (corrected protocol)
on validation images. It needs only the areas of each image's components, so all settings are compared exactly.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mgcc_dist.common.errors import UserError
from mgcc_dist.evaluation.metrics import scores_from_counts

MIN_AREAS = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)
"""shares of the image that `choose` compares"""
WORDS = "fill, min=SHARE, largest"


@dataclass(frozen=True)
class Postprocess:
    """What is done to a mask."""

    fill: bool = False
    """fill holes"""
    min_area: float = 0.0
    """drop components below this share of the image's pixels"""
    largest: bool = False
    """keep only the largest component"""

    def __str__(self) -> str:
        words = ["fill"] * self.fill + [f"min={self.min_area:g}"] * bool(self.min_area) + ["largest"] * self.largest
        return ",".join(words) or "none"

    def __call__(self, mask: np.ndarray) -> np.ndarray:
        """Return the processed mask, bool [H,W]; components are connected over edges, not corners."""
        if not mask.any():
            return mask
        components = _components(mask, self.fill)
        return np.isin(components, 1 + self._kept(np.bincount(components.ravel())[1:], mask.size))

    def _kept(self, areas: np.ndarray, pixels: int) -> np.ndarray:
        """Return the indices of the components to keep from the areas of all."""
        kept = np.flatnonzero(areas >= self.min_area * pixels)
        return kept[areas[kept].argmax()][None] if self.largest and len(kept) else kept


SETTINGS = [
    Postprocess(fill, min_area, largest)
    for largest in (False, True)
    for fill in (False, True)
    for min_area in MIN_AREAS
]
"""what `choose` compares; of equally good ones it takes the first"""


def parse(words: str) -> Postprocess:
    """Read a setting as `str` writes it.

    Raises:
        UserError: a word is unknown, or the share is not a number from 0 to 1.
    """
    values: dict[str, bool | float] = {}
    for word in words.split(","):
        name, _, value = word.strip().partition("=")
        if word.strip() in ("fill", "largest"):
            values[name] = True
        elif name == "min" and _is_share(value):
            values["min_area"] = float(value)
        elif word.strip() != "none":
            raise UserError(
                f"--postprocess {words}: {word!r} is not one of {WORDS} (a number from 0 to 1), none or choose, and "
                f"{words} is not the folder of an evaluation"
            )
    return Postprocess(**values)  # type: ignore[arg-type]


def setting_scores(mask: np.ndarray, truth: np.ndarray) -> list[float]:
    """Return the IoU (corrected protocol) of one image under each of SETTINGS; bool masks [H,W]."""
    scores, pixels, lesion = [], truth.size, int(truth.sum())
    tables = {fill: _component_table(mask, truth, fill) for fill in (False, True)}
    for setting in SETTINGS:
        areas, overlaps = tables[setting.fill]
        kept = setting._kept(areas, pixels)
        counts = (int(overlaps[kept].sum()), int(areas[kept].sum()), lesion)
        scores.append(scores_from_counts(counts, pixels)["corrected"]["iou"])
    return scores


def choose(scores: Iterable[Sequence[float]]) -> Postprocess:
    """Return the setting with the highest mean of `setting_scores` over images."""
    means = np.round(np.mean(list(scores), axis=0), 9)  # rounding errors must not decide between equal settings
    return SETTINGS[int(means.argmax())]


def _components(mask: np.ndarray, fill: bool) -> np.ndarray:
    """Number the components of a mask from 1: int32 [H,W], 0 outside."""
    from scipy import ndimage

    return ndimage.label(ndimage.binary_fill_holes(mask) if fill else mask)[0]


def _component_table(mask: np.ndarray, truth: np.ndarray, fill: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the area of each component and how much of it is lesion, int64 [components]."""
    components = _components(mask, fill)
    areas = np.bincount(components.ravel())[1:]
    return areas, np.bincount(components[truth], minlength=len(areas) + 1)[1:]


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
