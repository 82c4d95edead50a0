"""Paired bootstrap test between two methods, with Holm's correction.

Two methods are compared by their scores on the same image after training on the same split. An image may be in the
validation set of several splits, so images, with all their differences, are resampled (a cluster bootstrap). The p
value is two-sided and consistent with the interval: it is below 0.05 exactly where the 95 % interval excludes 0.

The test accounts for the choice of validation images. It does not account for other seeds and splits, which would train
other networks: of these, three runs show only the standard deviation in the tables. So a small p value says that the
trained networks differ, not that the methods do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000
SEED = 0
MIN_IMAGES = 20  # with fewer images the bootstrap reports differences where there are none


@dataclass(frozen=True)
class Difference:
    """Mean paired difference over images and splits, its 95 % interval, and the p value of the null hypothesis of 0."""

    mean: float
    low: float
    high: float
    p: float
    images: int
    pairs: int
    """number of (image, split) pairs"""


def paired_bootstrap(sums: np.ndarray, counts: np.ndarray) -> list[Difference] | None:
    """Test the mean of paired differences for each of M scores.

    Args:
        sums: float [N,M], per image the sum of its differences over its splits.
        counts: int [N], the number of splits of each image; at least 1.

    Returns:
        M differences, from the percentiles of `RESAMPLES` resampled means; None for fewer than `MIN_IMAGES` images.
    """
    images = len(sums)
    if images < MIN_IMAGES:
        return None
    weights = _resamples(images)
    means = (weights @ sums) / (weights @ counts)[:, None]  # [RESAMPLES,M]
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    # +1 for the sample itself, so that the p value is never 0.
    tail = 1 + np.minimum((means <= 0).sum(axis=0), (means >= 0).sum(axis=0))
    p = np.minimum(1.0, 2 * tail / (RESAMPLES + 1))
    mean = sums.sum(axis=0) / counts.sum()
    pairs = int(counts.sum())
    return [
        Difference(float(mean[m]), float(low[m]), float(high[m]), float(p[m]), images, pairs)
        for m in range(sums.shape[1])
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p values of a family of tests (Holm 1979); returns them in the given order.

    The k-th smallest of n is multiplied by n - k + 1, then made monotone and clipped to 1.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


@lru_cache(maxsize=2)  # a table compares all methods on the same images, and on those with a lesion
def _resamples(images: int) -> np.ndarray:
    """Multiplicity of each image in each resample: float64 [RESAMPLES,images]."""
    drawn = np.random.default_rng(SEED).integers(images, size=(RESAMPLES, images))
    drawn += images * np.arange(RESAMPLES)[:, None]
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * images).reshape(RESAMPLES, images).astype(np.float64)
