"""Bootstrap over images: intervals of means, and a paired test between two methods with Holm's correction.

Intervals resample clusters (patients, or groups of near-duplicates), because images of one patient are alike: with
images as the unit, the interval of the mean would be too narrow. They are bias-corrected and accelerated (BCa, Efron
1987), because scores are skewed. They account for the choice of patients, and not for other seeds or splits.

Two methods are compared by their scores on the same image after training on the same split. An image may be in the
validation set of several splits, so images, with all their differences, are resampled (a cluster bootstrap). The p
value is two-sided and consistent with the interval: it is below 0.05 exactly where the 95 % interval excludes 0.

The test accounts for the choice of validation images. It does not account for other seeds and splits, which would train
other networks: of these, three runs show only the standard deviation in the tables. So a small p value says that the
trained networks differ, not that the methods do.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000
SEED = 0
MIN_IMAGES = 20  # with fewer images the bootstrap reports differences where there are none
MIN_CLUSTERS = 10  # with fewer, an interval of nominally 95 % covers the mean in under 90 % of cases
LEVEL = 0.95


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


def grouped_permutation(groups: Sequence[str], generator: np.random.Generator) -> np.ndarray:
    """Return a random order of the images in which those of a group are adjacent, so that halves split at most one."""
    names, group = np.unique(groups, return_inverse=True)
    return np.lexsort((generator.permutation(len(groups)), generator.permutation(len(names))[group]))


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


@dataclass(frozen=True)
class Interval:
    """A mean over images with its 95 % interval; `low` and `high` are None where the data allow none."""

    mean: float
    low: float | None
    high: float | None
    images: int
    clusters: int


def mean_intervals(values: np.ndarray, clusters: Sequence[str], bounded: Sequence[bool]) -> list[Interval | None]:
    """Average each of M scores over the images that have it, with a cluster bootstrap interval (BCa).

    If all images have the same score, resampling shows no variation. At an end of [0,1] the interval then is that of
    an event that was not observed in any cluster: the mean of scores in [0,1] is at most the share of clusters that
    differ from 0, and 0 of C clusters exclude a share above 1 - 0.025^(1/C).

    Args:
        values: float [N,M]; NaN where an image does not have the score.
        clusters: the cluster of each image.
        bounded: whether each score is in [0,1].

    Returns:
        M intervals; None for a score that no image has. Fewer than MIN_CLUSTERS clusters have a mean, but no interval.
    """
    defined = ~np.isnan(values)
    _, cluster = np.unique(clusters, return_inverse=True)
    sums, counts = (np.zeros((cluster.max() + 1, values.shape[1])) for _ in range(2))
    np.add.at(sums, cluster, np.where(defined, values, 0.0))
    np.add.at(counts, cluster, defined)

    intervals: list[Interval | None] = [None] * values.shape[1]
    patterns, pattern = np.unique(counts > 0, axis=1, return_inverse=True)
    for number, has_images in enumerate(patterns.T):  # scores that the same clusters have share their resamples
        columns = np.flatnonzero(pattern.ravel() == number)
        if has_images.any():
            found = _cluster_bootstrap(sums[np.ix_(has_images, columns)], counts[np.ix_(has_images, columns)])
            for column, (mean, low, high) in zip(columns.tolist(), found, strict=True):
                size = int(has_images.sum())
                if low == high and mean in (0.0, 1.0) and bounded[column] and size >= MIN_CLUSTERS:
                    unseen = ((1 - LEVEL) / 2) ** (1 / size)
                    low, high = (0.0, 1 - unseen) if mean == 0 else (unseen, 1.0)
                known = low is not None and low != high
                images = int(defined[:, column].sum())
                intervals[column] = Interval(mean, low if known else None, high if known else None, images, size)
    return intervals


def _cluster_bootstrap(sums: np.ndarray, counts: np.ndarray) -> list[tuple[float, float | None, float | None]]:
    """Return mean, low and high of M scores from their sums and numbers of images in each cluster, [C,M]."""
    from scipy.stats import bootstrap  # takes a second, and only an evaluation needs it

    size = len(sums)
    means = sums.sum(axis=0) / counts.sum(axis=0)
    if size < MIN_CLUSTERS:
        return [(float(mean), None, None) for mean in means]

    def resampled_means(drawn: np.ndarray, axis: int) -> np.ndarray:
        """[B,K] indices of clusters -> [M,B] means; for [K] indices [M]."""
        rows = np.atleast_2d(drawn)
        shifted = rows + size * np.arange(len(rows))[:, None]
        weights = np.bincount(shifted.ravel(), minlength=size * len(rows)).reshape(len(rows), size)
        # BCa counts the resamples below the sample's mean, so ties with it must not depend on rounding.
        return np.round((weights @ sums) / (weights @ counts), 12).T.reshape(-1, *drawn.shape[:-1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of scores without variation, which the caller handles
        result = bootstrap(
            (np.arange(size),),
            resampled_means,
            n_resamples=RESAMPLES,
            batch=1000,
            vectorized=True,
            axis=-1,
            confidence_level=LEVEL,
            method="BCa",
            rng=np.random.default_rng(SEED),
        )
    # BCa is undefined where every resample is on one side of the mean: without variation, or nearly so.
    percentiles = np.quantile(result.bootstrap_distribution, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1)
    low, high = np.where(np.isnan(result.confidence_interval), percentiles, result.confidence_interval)
    return [(float(mean), float(a), float(b)) for mean, a, b in zip(means, low, high, strict=True)]
