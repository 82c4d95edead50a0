"""Temperature scaling recovers a known temperature and keeps masks."""

import json

import numpy as np
import pytest
from scipy.special import expit, logit

from mgcc_dist.common.errors import UserError
from mgcc_dist.evaluation.calibration import reliability, reliability_bins
from mgcc_dist.evaluation.temperature import (
    calibrate,
    fit_temperature,
    logit_histogram,
    read_temperature,
    write_temperature,
)


def simulate(temperature, images=4, size=128):
    """Images whose lesion pixels are drawn by the true probability, with that of a network that needs `temperature`."""
    random = np.random.default_rng(0)
    for _ in range(images):
        logits = random.normal(-1, 1.5, (size, size))
        yield expit(logits * temperature).astype(np.float32), random.random((size, size)) < expit(logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_recovered_and_ece_falls(temperature):
    pairs = list(simulate(temperature))
    fitted = fit_temperature([logit_histogram(*pair) for pair in pairs])
    assert fitted.temperature == pytest.approx(temperature, rel=0.03)
    assert fitted.nll.after <= fitted.nll.before
    before = reliability([reliability_bins(*pair) for pair in pairs])["ece"]
    after = reliability([reliability_bins(calibrate(p, fitted.temperature), truth) for p, truth in pairs])["ece"]
    assert (fitted.ece.before, fitted.ece.after) == pytest.approx((before, after), abs=0.003)
    assert after < 0.01


def test_calibrated_probabilities_are_those_of_the_divided_logits():
    probability = np.array([0.0, 0.1, 0.5, 0.9, 1.0], np.float32)
    calibrated = calibrate(probability, 2.0)
    assert calibrated.dtype == np.float32
    np.testing.assert_allclose(calibrated[1:4], expit(logit([0.1, 0.5, 0.9]) / 2), rtol=1e-5)
    assert 0 < calibrated[0] < 0.001
    assert 0.999 < calibrated[4] < 1  # a saturated pixel has no infinite logit
    assert calibrate(probability, 1.0) is probability


def test_every_image_has_the_same_weight():
    (small, truth), (large, other) = next(simulate(1.0, 1, 8)), next(simulate(1.0, 1, 64))
    np.testing.assert_allclose([logit_histogram(small, truth).sum(), logit_histogram(large, other).sum()], 1)


def test_a_stored_temperature_belongs_to_its_weights(tmp_path):
    weights = tmp_path / "model.safetensors"
    info = {"weights": str(weights), "weights_sha256": "a"}
    with pytest.raises(UserError, match=r"calibration.json does not exist. Fit it by `mgcc evaluate --fit-temp"):
        read_temperature(info)
    fitted = fit_temperature([logit_histogram(*pair) for pair in simulate(2.0)])
    path = write_temperature(fitted, weights, "a", "split")
    assert read_temperature(info) == fitted.temperature
    with pytest.raises(UserError, match="was fitted for other weights"):
        read_temperature(info | {"weights_sha256": "b"})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": -1.0}))
    with pytest.raises(UserError, match=r"has temperature -1.0"):
        read_temperature(info)
