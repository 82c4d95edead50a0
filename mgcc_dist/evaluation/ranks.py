"""Compare several methods over several blocks (splits, data sets) by their ranks (Demsar 2006).

Friedman's test asks whether any method differs from the others. If so, Nemenyi's test tells which: two methods differ
where their mean ranks are at least the critical difference apart.
"""

import math
from dataclasses import dataclass

import numpy as np

from mgcc_dist.evaluation.statistics import LEVEL

MIN_METHODS = 3
MIN_BLOCKS = 5


@dataclass(frozen=True)
class Ranking:
    mean_ranks: list[float]
    """of each method; 1 is the best"""
    p: float
    """of Friedman's test: that all methods are alike"""
    critical_difference: float
    """of Nemenyi's test at 5 %"""
    blocks: int

    def alike(self) -> list[list[int]]:
        """Return the largest sets of two or more methods that do not differ, each ordered by rank."""
        order = sorted(range(len(self.mean_ranks)), key=lambda method: self.mean_ranks[method])
        sets: list[list[int]] = []
        for start, first in enumerate(order):
            near = [
                other
                for other in order[start:]
                if self.mean_ranks[other] - self.mean_ranks[first] < self.critical_difference
            ]
            if len(near) > 1 and not any(set(near) <= set(earlier) for earlier in sets):
                sets.append(near)
        return sets


def rank(scores: np.ndarray) -> Ranking | None:
    """Rank methods by `scores` [blocks,methods], of which higher is better; None for too few of either.

    Equal scores share their mean rank.
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range  # takes a second to import

    blocks, methods = scores.shape
    if blocks < MIN_BLOCKS or methods < MIN_METHODS:
        return None
    ranks = rankdata(-scores, axis=1)
    # Friedman's statistic is undefined if all methods are equal on every block.
    p = 1.0 if (scores == scores[:, :1]).all() else float(friedmanchisquare(*scores.T).pvalue)
    quantile = float(studentized_range.ppf(LEVEL, methods, np.inf)) / math.sqrt(2)
    difference = quantile * math.sqrt(methods * (methods + 1) / (6 * blocks))
    return Ranking(ranks.mean(axis=0).tolist(), p, difference, blocks)
