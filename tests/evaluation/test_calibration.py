"""ECE equals torchmetrics', AURC its definition."""

import itertools

import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryCalibrationError

from mgcc_dist.evaluation.calibration import BINS, brier, confidence, reliability, reliability_bins, risk_coverage


def image(seed, shape=(9, 14)):
    rng = np.random.default_rng(seed)
    probability = rng.random(shape, dtype=np.float32) ** 2
    return probability, rng.random(shape) < probability**1.5


def test_ece_and_brier_equal_torchmetrics_and_a_plain_mean():
    images = [image(seed) for seed in range(6)]
    theirs = BinaryCalibrationError(n_bins=BINS, norm="l1")
    for probability, truth in images:
        theirs.update(torch.from_numpy(probability), torch.from_numpy(truth).int())
    ours = reliability([reliability_bins(*each) for each in images])
    assert ours["ece"] == pytest.approx(theirs.compute().item(), rel=1e-5)
    assert brier(*images[0]) == pytest.approx(np.mean((images[0][0].astype(float) - images[0][1]) ** 2))


def test_images_count_equally_whatever_their_size():
    small, large = image(0, (4, 4)), image(1, (40, 40))
    bins = [reliability_bins(*small), reliability_bins(*large)]
    alone = [reliability([each])["bins"] for each in bins]
    both = reliability(bins)["bins"]
    for entry in both:
        shares = [next((b["pixels"] for b in one if b["from"] == entry["from"]), 0) for one in alone]
        assert entry["pixels"] == pytest.approx(np.mean(shares))
    assert sum(entry["pixels"] for entry in both) == pytest.approx(1)


def test_certain_and_right_is_perfectly_calibrated_and_certain_and_wrong_is_not():
    truth = np.eye(5, dtype=bool)
    for probability, error in ((truth.astype(np.float32), 0), (1 - truth.astype(np.float32), 1)):
        assert reliability([reliability_bins(probability, truth)])["ece"] == error
        assert brier(probability, truth) == error


def test_confidence_of_a_mask_and_of_an_empty_one():
    probability = np.array([[0.9, 0.7, 0.1]], np.float32)
    assert confidence(probability, probability > 0.5) == pytest.approx(0.8)
    assert confidence(probability, probability > 2) == pytest.approx(0.1)


def test_risk_coverage_by_hand():
    curve = risk_coverage([0.9, 0.2, 0.5], [0.0, 0.6, 0.3])
    assert curve["risk"] == pytest.approx([0, 0.15, 0.3])
    assert curve["aurc"] == curve["aurc_best"] == pytest.approx(0.15)
    assert curve["aurc_random"] == pytest.approx(0.3)
    assert risk_coverage([0.1, 0.9, 0.5], [0.0, 0.6, 0.3])["aurc"] == pytest.approx((0.6 + 0.45 + 0.3) / 3)


def test_equal_confidences_count_as_the_mean_over_their_orders():
    risks = [0.1, 0.7, 0.4]
    orders = [risk_coverage([3, 2, 1], order)["aurc"] for order in itertools.permutations(risks)]
    assert risk_coverage([1, 1, 1], risks)["aurc"] == pytest.approx(np.mean(orders))
