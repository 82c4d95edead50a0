"""MGCC's step against Eq. 3 to 12 reimplemented in float64 (equations.py): losses and gradients over ten steps.

Nothing of the package computes here but the method itself. The only thing shared is the order in which random numbers
are drawn: auxiliary decoder 1, 2, ... and in each the levels from shallow to deep.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from equations import Reference, mse, supervised

from mgcc_dist.methods.config import MultiLevelCrossConsistencyConfig
from mgcc_dist.methods.method import build
from mgcc_dist.models.config import MGCCConfig
from mgcc_dist.train.schedules import Progress

LABELED, UNLABELED, TOTAL = 2, 3, 40_000


def losses_of(probabilities, masks, weight, detach):
    n = len(masks)
    on_labels = sum(supervised(p[:n], masks) for p in probabilities) / len(probabilities)  # Eq. 9
    main, *auxiliary = (p[n:] for p in probabilities)
    main = main.detach() if detach else main
    consistency = sum(mse(main, p) for p in auxiliary) / len(auxiliary)  # Eq. 11
    return on_labels + weight * consistency, on_labels, consistency  # Eq. 12


@pytest.mark.parametrize(
    ("taps", "gates", "perturb", "ramp", "detach"),
    [
        pytest.param((3, 6, 9), (True,) * 4, "all_levels", "released", False, id="paper"),
        pytest.param((1, 2, 3), (False, True, False, True), "bottleneck", "paper_0.1", True, id="switches"),
        pytest.param((1, 2, 3, 4), (False,) * 5, "all_levels", "released", True, id="K=4"),
    ],
)
def test_ten_steps_equal_the_equations_in_float64(taps, gates, perturb, ramp, detach):
    torch.manual_seed(11)
    network = MGCCConfig(widths=(3, 4, 5), taps=taps, kernel_size=3, gates=gates, perturb=perturb)
    method = build(MultiLevelCrossConsistencyConfig(ramp=ramp, detach_target=detach), network).double().train()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    images = torch.rand(LABELED + UNLABELED, 1, 16, 16, dtype=torch.float64) * 2 - 1
    masks = (images[:LABELED] > 0.3).double()
    batch = SimpleNamespace(images=images, masks=masks, labeled=LABELED)

    for number in range(10):
        step = 3_900 * number
        if ramp == "released":
            weight = 7 * math.exp(-5 * (1 - min(step // 150, 200) / 200) ** 2)
        else:
            weight = 0.1 * math.exp(-5 * (1 - step / TOTAL) ** 2)

        torch.manual_seed(number)
        losses = method(batch, Progress(step, TOTAL, epoch=0.0, images=4 * step, seed=0))
        optimizer.zero_grad()
        losses["loss"].backward()
        weights = {name: p.detach().clone().requires_grad_() for name, p in method.network.named_parameters()}
        reference = Reference(weights, taps, gates, perturb == "all_levels", levels=3)
        torch.manual_seed(number)
        expected = losses_of(reference.mgcc(images), masks, weight, detach)
        gradients = torch.autograd.grad(expected[0], weights.values())

        assert losses["weight"].item() == pytest.approx(weight)
        for name, value in zip(("loss", "supervised", "consistency"), expected, strict=True):
            assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), (number, name)
        assert losses["consistency"].item() > 0
        largest = max(gradient.abs().max() for gradient in gradients)
        for (name, parameter), gradient in zip(method.network.named_parameters(), gradients, strict=True):
            error = (parameter.grad - gradient).abs().max()
            assert error <= 1e-5 * largest, (number, name, error, largest)
        optimizer.step()
