"""The paired test under the null hypothesis, with a planted difference, in any order; Holm's correction by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.evaluation.statistics import MIN_IMAGES, holm, paired_bootstrap


def clusters(rng, images, shift=0.0):
    """Differences of 3 scores: each image in one to three splits, its differences alike within the image."""
    counts = rng.integers(1, 4, size=images)
    own = rng.standard_t(5, size=(images, 3)) + shift
    sums = own * counts[:, None] + rng.normal(size=(images, 3)) * np.sqrt(counts)[:, None]
    return sums, counts


def test_p_values_are_uniform_under_the_null_hypothesis():
    p = np.array(
        [[d.p for d in paired_bootstrap(*clusters(np.random.default_rng(k), 120))] for k in range(200)]
    ).ravel()
    for level in (0.05, 0.2, 0.5, 0.8):
        assert abs((p <= level).mean() - level) < 0.06  # three standard deviations of a share of 600 at the widest


def test_images_in_several_splits_do_not_count_as_several_images():
    sums, counts = clusters(np.random.default_rng(0), 60)
    for once, thrice in zip(paired_bootstrap(sums, counts), paired_bootstrap(3 * sums, 3 * counts), strict=True):
        assert thrice.p == once.p
        assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
        assert (thrice.images, thrice.pairs) == (once.images, 3 * once.pairs)


def test_planted_difference_is_found_and_its_interval_covers_it():
    found = paired_bootstrap(*clusters(np.random.default_rng(3), 300, shift=np.array([0.5, 0.0, -0.5])))
    better, same, worse = found
    assert better.p < 0.001
    assert worse.p < 0.001
    assert better.low < 0.5 < better.high
    assert worse.low < -0.5 < worse.high
    assert same.low < 0 < same.high
    assert same.p > 0.05


def test_equal_scores_give_no_difference():
    (difference,) = paired_bootstrap(np.zeros((50, 1)), np.ones(50, int))
    assert (difference.mean, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(0, 1000), st.floats(-0.5, 0.5))
def test_p_value_agrees_with_the_interval_and_sign_flips_mirror_it(seed, shift):
    sums, counts = clusters(np.random.default_rng(seed), 40, shift)
    for one, other in zip(paired_bootstrap(sums, counts), paired_bootstrap(-sums, counts), strict=True):
        assert (one.p < 0.05) == (not one.low <= 0 <= one.high) or abs(one.p - 0.05) < 0.001
        assert (one.p, one.mean) == (other.p, -other.mean)
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_too_few_images_are_not_tested():
    assert paired_bootstrap(np.ones((MIN_IMAGES - 1, 2)), np.ones(MIN_IMAGES - 1, int)) is None
    assert paired_bootstrap(np.ones((MIN_IMAGES, 2)), np.ones(MIN_IMAGES, int)) is not None


def test_holm_matches_the_published_example():
    # By hand: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which is raised to the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p):
    adjusted = holm(p)
    for one, corrected in zip(p, adjusted, strict=True):
        assert one <= corrected <= min(1, len(p) * one) or corrected == pytest.approx(min(1, len(p) * one))
    ordered = [corrected for _, corrected in sorted(zip(p, adjusted, strict=True))]
    assert ordered == sorted(ordered)


@settings(deadline=None, derandomize=True)
@given(st.permutations([0.001, 0.01, 0.02, 0.3, 0.9]))
def test_holm_does_not_depend_on_the_order(p):
    assert dict(zip(p, holm(p), strict=True)) == dict(zip(sorted(p), holm(sorted(p)), strict=True))
