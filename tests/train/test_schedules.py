"""Learning rate and consistency weight at the first, middle, last and later steps."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.data.loader import ImageTrainLoader, Ranks, Stream, StreamOffsets
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.train.loop import total_steps
from mgcc_dist.train.schedules import Progress, consistency_weight, gaussian_ramp, learning_rate_factor, poly


def progress_at(step, total):
    """On one rank with the paper's 4 labeled images per step."""
    return Progress(step, total, epoch=0.0, images=4 * step, seed=0)


def test_poly_at_first_middle_last_and_beyond():
    assert learning_rate_factor("poly", 0, 1000) == 1.0
    assert learning_rate_factor("poly", 500, 1000) == pytest.approx(0.5**0.9)
    assert learning_rate_factor("poly", 999, 1000) == pytest.approx(0.001**0.9)
    assert learning_rate_factor("poly", 1000, 1000) == 0.0
    assert learning_rate_factor("poly", 1500, 1000) == 0.0
    assert isinstance(poly(1500, 1000), float)  # Python's power of a negative number would be complex


def test_constant_and_cosine():
    assert [learning_rate_factor("constant", step, 10) for step in (0, 9, 10)] == [1.0, 1.0, 0.0]
    assert learning_rate_factor("cosine", 0, 10) == 1.0
    assert learning_rate_factor("cosine", 5, 10) == pytest.approx(0.5)
    assert learning_rate_factor("cosine", 9, 10) == pytest.approx((1 + math.cos(0.9 * math.pi)) / 2)
    assert learning_rate_factor("cosine", 11, 10) == 0.0


def test_warmup_rises_linearly_to_the_start_of_the_schedule():
    factors = [learning_rate_factor("poly", step, 104, warmup=4) for step in range(6)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.99**0.9])


@given(
    st.sampled_from(["poly", "constant", "cosine"]),
    st.integers(0, 300),
    st.integers(1, 200),
    st.integers(0, 250),
)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_factor_is_in_the_unit_interval_and_zero_only_from_the_end_on(schedule, step, total, warmup):
    factor = learning_rate_factor(schedule, step, total, warmup)
    assert 0.0 <= factor <= 1.0
    assert (factor == 0.0) == (step >= total)


@pytest.mark.parametrize(
    ("label_share", "final"),
    [(1.0, 7.0), (0.5, 3.99), (0.25, 0.74)],
)
def test_released_ramp_ends_at_the_weight_of_the_released_code(label_share, final):
    steps = int(40000 * label_share)
    assert consistency_weight("released", progress_at(steps - 1, steps)) == pytest.approx(final, abs=0.005)


BUSI = range(263)
"""as many images as the labeled half of BUSI's training set"""


def run_of(preset, ranks, *words):
    """The progress of each step of a preset on BUSI, on one or several ranks, and its config."""
    config = parse(SegmentConfig, ["--preset", preset, *words], CONFIGS / "segment")
    data = config.data
    unlabeled = Stream(BUSI, data.batch_unlabeled)
    loader = ImageTrainLoader(Stream(BUSI, data.batch_labeled), unlabeled, image_size=8, seed=0, ranks=Ranks(0, ranks))
    total = total_steps(config.loop, loader, batches=ranks * config.loop.accumulation)
    images = ranks * data.batch_labeled * config.loop.accumulation
    for step in range(total):
        offsets = StreamOffsets(step * images, step * images)
        yield config, Progress(step, total, loader.epoch_of(offsets), loader.consumed(offsets), seed=0)


@pytest.mark.parametrize(
    ("words", "final"),
    [
        (["mgcc_busi"], 3.861),
        (["mgcc_busi_released"], 3.994),
        (["mgcc_busi", "--method.ramp", "ssl4mis"], 0.0552),
        (["mgcc_busi", "--method.ramp", "compressed"], 3.99),
        (["mgcc_busi", "--method.ramp", "paper_0.1"], 0.1),
        (["mgcc_busi", "--loop.accumulation", "2"], 3.861),
        (["mgcc_busi", "--data.batch_labeled", "16"], 3.861),
    ],
)
def test_a_preset_has_the_same_ramp_and_learning_rate_on_1_and_8_ranks(words, final):
    """Counted in steps, mgcc_busi would end at a weight of 0.10 on 8 ranks."""
    one, eight = (list(run_of(words[0], ranks, *words[1:])) for ranks in (1, 8))
    assert len(one) == pytest.approx(8 * len(eight), abs=8)
    for number, (config, progress) in enumerate(eight):
        _, expected = one[8 * number]
        assert progress.images == expected.images
        weights = [consistency_weight(config.method.ramp, each) for each in (progress, expected)]
        assert weights[0] == pytest.approx(weights[1], rel=0.01)
        rates = [
            learning_rate_factor(config.loop.schedule, each.step, each.total_steps) for each in (progress, expected)
        ]
        assert rates[0] == pytest.approx(rates[1], abs=0.002)
    assert weights[0] == pytest.approx(final, rel=0.01)


def test_released_preset_has_the_length_of_the_released_code():
    assert sum(1 for _ in run_of("mgcc_busi_released", 1)) == 20_000


def test_released_ramp_counts_in_steps_of_150_for_any_length():
    weights = {
        consistency_weight("released", progress_at(step, total)) for step in (300, 375, 449) for total in (500, 40000)
    }
    assert weights == {7 * math.exp(-5 * (1 - 2 / 200) ** 2)}
    assert consistency_weight("released", progress_at(0, 40000)) == pytest.approx(7 * math.exp(-5))


def test_compressed_ramp_is_the_released_ramp_of_20000_steps_for_any_length():
    for share in (0.0, 0.25, 0.5, 1.0):
        released = 7 * math.exp(-5 * (1 - share * 20_000 / 150 / 200) ** 2)
        for total in (40, 1000):
            assert consistency_weight("compressed", progress_at(int(share * total), total)) == pytest.approx(released)
    assert consistency_weight("compressed", progress_at(40, 40)) == pytest.approx(4.0, abs=0.02)


def test_ramps_of_the_baselines_are_a_seventieth_of_those_of_mgcc():
    for ramp, mgcc in (("ssl4mis", "released"), ("ssl4mis_compressed", "compressed")):
        for step in (0, 1500, 10_000, 40_000):
            progress = progress_at(step, 40_000)
            assert consistency_weight(ramp, progress) == pytest.approx(consistency_weight(mgcc, progress) / 70)
    assert consistency_weight("ssl4mis", progress_at(30_000, 40_000)) == pytest.approx(0.1)


def test_paper_ramp_covers_the_full_run():
    assert consistency_weight("paper_0.1", progress_at(0, 80)) == pytest.approx(0.1 * math.exp(-5))
    assert consistency_weight("paper_0.1", progress_at(40, 80)) == pytest.approx(0.1 * math.exp(-1.25))
    assert consistency_weight("paper_0.1", progress_at(80, 80)) == 0.1


def test_ramp_stays_at_its_maximum_after_its_end():
    assert gaussian_ramp(200, 200) == gaussian_ramp(5000, 200) == 1.0
