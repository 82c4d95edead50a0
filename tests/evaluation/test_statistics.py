"""Intervals cover the mean; the paired test under the null hypothesis, with a planted difference, in any order; Holm's
correction by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.evaluation.statistics import MIN_CLUSTERS, MIN_IMAGES, holm, mean_intervals, paired_bootstrap


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


SCORE_MEAN, EVENT_MEAN = 2.5 / 3.3, 0.1


def patients(rng, count):
    """Two scores of 1 to 4 images per patient, alike within the patient: skewed as IoU is, and a rare event."""
    patient = np.repeat(np.arange(count), rng.integers(1, 5, count))
    own, single = rng.beta(2.5, 0.8, count)[patient], rng.beta(2.5, 0.8, len(patient))
    score = np.where(rng.random(len(patient)) < 0.7, own, single)
    event = (rng.random(count) < EVENT_MEAN)[patient]
    return np.stack([score, event], axis=1), [f"p{i}" for i in patient]


@pytest.mark.parametrize(("count", "least"), [(MIN_CLUSTERS, 0.86), (40, 0.9)])
def test_intervals_cover_the_mean_where_patients_have_several_images(count, least):
    covered, repeats = np.zeros(3), 100
    for seed in range(repeats):
        values, clusters = patients(np.random.default_rng(seed), count)
        score, event = mean_intervals(values, clusters, [True, True])
        (as_images,) = mean_intervals(values[:, :1], [str(i) for i in range(len(values))], [True])
        means = (SCORE_MEAN, EVENT_MEAN, SCORE_MEAN)
        for number, (each, mean) in enumerate(zip((score, event, as_images), means, strict=True)):
            covered[number] += each.low <= mean <= each.high
    assert (covered[:2] / repeats >= least).all()
    assert covered[2] < covered[0]  # images as the unit: too narrow


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 40), st.sampled_from([0, 0.02, 0.5, 1]))
def test_intervals_enclose_the_mean_and_never_leave_the_range(seed, count, share):
    rng = np.random.default_rng(seed)
    values = (rng.random((count, 2)) < share).astype(float)
    values[rng.random(count) < 0.3, 1] = np.nan
    for interval in mean_intervals(values, [f"p{i}" for i in rng.integers(0, 30, count)], [True, True]):
        if interval is not None:
            assert (interval.low is None) == (interval.high is None)
            assert interval.low is None or 0 <= interval.low <= interval.mean <= interval.high <= 1
            assert interval.low != interval.high or interval.low is None
            assert interval.low is None or interval.clusters >= MIN_CLUSTERS


def test_mean_is_over_the_images_that_have_the_score():
    values = np.array([[0.2, np.nan, np.nan], [0.4, 0.5, np.nan], [0.9, 0.7, np.nan]])
    first, second, none = mean_intervals(values, ["a", "a", "b"], [True] * 3)
    assert (first.mean, first.images, first.clusters) == (pytest.approx(0.5), 3, 2)
    assert (second.mean, second.images, second.clusters) == (pytest.approx(0.6), 2, 2)
    assert first.low is second.low is none is None


def test_an_event_that_never_happened_excludes_only_what_it_can():
    """Zero of 40 excludes shares of which 40 would all be spared in under 2.5 % of cases."""
    low, high = mean_intervals(np.array([[0.0, 1.0]] * 40), [str(i) for i in range(40)], [True, True])
    assert (low.low, low.high) == (0, pytest.approx(0.0881, abs=1e-4))
    assert (high.low, high.high) == (pytest.approx(0.9119, abs=1e-4), 1)
    (distance,) = mean_intervals(np.zeros((40, 1)), [str(i) for i in range(40)], [False])
    assert (distance.mean, distance.low) == (0, None)


def test_interval_equals_scipys_where_each_patient_has_one_image():
    from scipy.stats import bootstrap

    values = np.random.default_rng(5).beta(2, 1, 60)
    (ours,) = mean_intervals(values[:, None], [f"{i:02d}" for i in range(60)], [True])
    theirs = bootstrap((values,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(7))
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.003)


def test_a_score_has_the_same_interval_alone_and_next_to_others():
    values = np.linspace(0.1, 0.9, 13)[:, None]  # evenly spaced: many resampled means tie with the sample's
    clusters = [str(index) for index in range(13)]
    (alone,) = mean_intervals(values, clusters, [True])
    first, *_ = mean_intervals(np.hstack([values, values**2, values / 3]), clusters, [True] * 3)
    assert (first.low, first.high) == pytest.approx((alone.low, alone.high), abs=1e-9)
