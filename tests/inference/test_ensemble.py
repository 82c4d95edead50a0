"""Means over networks and views: every view is turned back before it counts."""

import numpy as np
import pytest
import torch
from torch import nn

from mgcc_dist.common.errors import UserError
from mgcc_dist.inference.ensemble import Ensemble
from mgcc_dist.inference.predictor import Predictor

SIZE = 64


class Place(nn.Module):
    """Logits are the image plus a ramp to the lower right, so that they depend on the place in the view."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(x.shape[-1])
        ramp = torch.linspace(-1, 1, x.shape[-1])
        return self.gain * (x + ramp + ramp[:, None])


def image(height=50, width=70):
    return np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)


def predict(networks, **options):
    predictors = [Predictor(network, SIZE, device="cpu", precision="no") for network in networks]
    (probability,) = Ensemble(predictors, **options).probabilities([image()], ["a"])
    return probability


def test_one_network_without_views_is_the_predictor_itself():
    predictor = Predictor(Place(), SIZE, device="cpu", precision="no")
    np.testing.assert_array_equal(predict([Place()]), predictor.predict(image()).probability)


def test_an_ensemble_is_the_mean_probability_also_of_networks_of_other_sizes():
    first, second = (
        Predictor(Place(gain), size, device="cpu", precision="no") for gain, size in ((1.0, 64), (3.0, 32))
    )
    (probability,) = Ensemble([first, second]).probabilities([image()], ["a"])
    expected = (first.predict(image()).probability + second.predict(image()).probability) / 2
    np.testing.assert_allclose(probability, expected, atol=1e-6)


def test_flips_are_turned_back():
    """By hand: the network on each mirrored image, its output mirrored back, and their mean."""
    predictor = Predictor(Place(), SIZE, device="cpu", precision="no")
    views = [
        np.flip(predictor.predict(np.ascontiguousarray(np.flip(image(), axes))).probability, axes)
        for axes in ((), (0,), (1,), (0, 1))
    ]
    np.testing.assert_allclose(predict([Place()], flips=True), np.mean(views, axis=0), atol=0.01)
    assert np.ptp(np.stack(views), axis=0).max() > 0.2  # the views differ, so the mean says something


def test_scales_are_sizes_that_five_levels_can_halve():
    network = Place()
    probability = predict([network], scales=True)
    assert network.sizes == [64, 48, 80]
    assert probability.shape == (50, 70)
    assert np.abs(probability - predict([Place()])).max() < 0.3


def test_change_sees_what_the_networks_see():
    seen = []
    ensemble = Ensemble([Predictor(Place(), size, device="cpu", precision="no") for size in (64, 32)], flips=True)
    (black,) = ensemble.probabilities([image()], ["a"], lambda squares: seen.append(squares.shape) or 0 * squares)
    assert seen == [(1, 64, 64), (1, 32, 32)]
    assert black.max() < 0.75


def test_a_network_that_cannot_take_other_sizes_is_an_error_of_the_option():
    class Fixed(Place):
        def forward(self, x):
            if x.shape[-1] != SIZE:
                raise UserError("image_size: 48x48 does not fit the network.")
            return super().forward(x)

    with pytest.raises(UserError, match=r"^--tta scales: image_size: 48x48 does not fit.*Leave out scales"):
        predict([Fixed()], scales=True)
    predictor = Predictor(Place(), 16, device="cpu", precision="no")
    with pytest.raises(UserError, match=r"^--tta scales: .* trained at 16 pixels, which is too small"):
        Ensemble([predictor], scales=True).probabilities([image()], ["a"])
