"""Is one method better than another on these images? A paired bootstrap over images, and Holm's correction.

Two methods are compared by their scores of the same image after training on the same split. An image may be in the
validation part of several splits; its differences then belong together, so whole images are drawn with replacement
(a cluster bootstrap). The p value is two-sided and agrees with the interval: it is below 0.05 where the 95 % interval
leaves out 0.

What the test covers: that other images might have been in the validation set. What it does not: that other seeds and
other splits would have given other networks. Three runs say little of that; the standard deviation over the splits in
the tables is all there is. So a small p means that these trained networks differ, not yet that the methods do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000
SEED = 0
FEWEST = 20  # images; of fewer, the bootstrap finds differences where there are none


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences over images and splits, its 95 % interval, and the p value of no difference."""

    mean: float
    low: float
    high: float
    p: float
    images: int
    pairs: int
    """image and split"""


def paired_bootstrap(sums: np.ndarray, counts: np.ndarray) -> list[Difference] | None:
    """Test the mean of paired differences for each of M scores.

    Args:
        sums: float [N,M], of each image the sum of its differences over the splits that it is in.
        counts: int [N], in how many splits that is; at least 1.

    Returns:
        M differences, by the percentiles of `RESAMPLES` resampled means; None for fewer than `FEWEST` images.
    """
    images = len(sums)
    if images < FEWEST:
        return None
    drawn = _resamples(images)
    means = (drawn @ sums) / (drawn @ counts)[:, None]  # [RESAMPLES,M]
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    # One is added for the sample itself: 10,000 resamples cannot show a p value of 0.
    tail = 1 + np.minimum((means <= 0).sum(axis=0), (means >= 0).sum(axis=0))
    p = np.minimum(1.0, 2 * tail / (RESAMPLES + 1))
    mean = sums.sum(axis=0) / counts.sum()
    pairs = int(counts.sum())
    return [
        Difference(float(mean[m]), float(low[m]), float(high[m]), float(p[m]), images, pairs)
        for m in range(sums.shape[1])
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values of a family of tests, in the order given.

    The k-th smallest of n is multiplied by n - k + 1; none may be smaller than one before it, or larger than 1.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


@lru_cache(maxsize=2)  # all methods of a table have the same images, and those with a lesion among them
def _resamples(images: int) -> np.ndarray:
    """float64 [RESAMPLES,images]: how often each image is in each resample."""
    drawn = np.random.default_rng(SEED).integers(images, size=(RESAMPLES, images))
    drawn += images * np.arange(RESAMPLES)[:, None]
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * images).reshape(RESAMPLES, images).astype(np.float64)
