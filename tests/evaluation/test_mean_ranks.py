"""Friedman's test and Nemenyi's critical difference."""

import math

import numpy as np
import pytest

from mgcc_dist.evaluation.ranks import Ranking, rank


@pytest.mark.parametrize(("methods", "critical"), [(3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_critical_values_are_those_of_demsar_s_table_5(methods, critical):
    blocks = 7
    ranking = rank(np.random.default_rng(0).random((blocks, methods)))
    expected = critical * math.sqrt(methods * (methods + 1) / (6 * blocks))
    assert ranking.critical_difference == pytest.approx(expected, rel=5e-4)


def test_the_highest_score_has_rank_1_and_equal_scores_share_a_rank():
    scores = np.array([[0.9, 0.5, 0.1]] * 4 + [[0.5, 0.5, 0.9]])
    ranking = rank(scores)
    assert ranking.mean_ranks == pytest.approx([(4 + 2.5) / 5, (8 + 2.5) / 5, (12 + 1) / 5])
    assert ranking.blocks == 5
    # Friedman's statistic with three methods has two degrees of freedom; all five blocks agree: 10.
    assert rank(np.array([[0.9, 0.5, 0.1]] * 5)).p == pytest.approx(math.exp(-10 / 2))


def test_methods_within_the_critical_difference_are_joined_in_the_largest_sets():
    assert Ranking([1.0, 1.8, 2.6, 4.0], 0.01, 1.0, 9).alike() == [[0, 1], [1, 2]]
    assert Ranking([3.0, 1.0, 2.0], 0.01, 1.5, 9).alike() == [[1, 2], [2, 0]]
    assert Ranking([1.0, 3.0], 0.01, 1.0, 9).alike() == []


def test_methods_that_are_equal_everywhere_share_their_rank():
    ranking = rank(np.ones((5, 3)))
    assert (ranking.mean_ranks, ranking.p) == ([2, 2, 2], 1)
    assert rank(np.ones((4, 3))) is None
    assert rank(np.ones((5, 2))) is None
