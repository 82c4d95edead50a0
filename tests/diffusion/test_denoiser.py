"""Denoiser: the loss of Eq. 2, its noise and its classes."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from tiny_ldm import DENOISER, LOOP, PROGRESS, SHAPE, latents_of

from mgcc_dist.diffusion import denoiser
from mgcc_dist.diffusion.config import UNetDenoiserConfig
from mgcc_dist.diffusion.denoiser import DenoiserLoss, predict
from mgcc_dist.diffusion.noise import RngStream, make_generators
from mgcc_dist.diffusion.objective import build_objective


@pytest.fixture
def module(unet):
    return DenoiserLoss(unet, build_objective(DENOISER), label_dropout=0.1)


@pytest.fixture
def with_classes():
    torch.manual_seed(2)
    return denoiser.build(replace(DENOISER, classes=True), SHAPE, 3)


def equation_2(z0, noise, t, a):
    return a.sqrt() * z0 + (1 - a).sqrt() * noise, t, noise, 1


def velocity_with_min_snr(z0, noise, t, a):
    zt, _, _, _ = equation_2(z0, noise, t, a)
    return zt, t, a.sqrt() * noise - (1 - a).sqrt() * z0, (a / (1 - a)).clamp(max=5) / (a / (1 - a) + 1)


def flow(z0, noise, t, a):
    sigma = (t + 1) / 1000
    return (1 - sigma) * z0 + sigma * noise, t + 1, noise - z0, 1


@pytest.mark.parametrize(
    ("change", "formula"),
    [
        ({}, equation_2),
        ({"objective": "v_prediction", "min_snr_gamma": 5.0}, velocity_with_min_snr),
        ({"objective": "flow"}, flow),
    ],
)
def test_loss_follows_the_formula(module, change, formula):
    module.objective = build_objective(replace(DENOISER, **change))
    unet = module.unet.double()
    moments = torch.randn(3, 4, 4, 4)
    indices = [11, 2, 30]
    loss = module(latents_of(moments, indices), PROGRESS)["loss"]

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    errors = []
    with torch.no_grad():
        for row, generator in zip(
            moments[:, None].double(), make_generators(PROGRESS.seed, RngStream.DIFFUSION, indices), strict=True
        ):
            mean, logvar = row.chunk(2, dim=1)
            z0 = mean + torch.exp(logvar / 2) * torch.randn(1, 2, 4, 4, generator=generator)
            t = torch.randint(1000, (1,), generator=generator)
            noise = torch.randn(1, 2, 4, 4, generator=generator).double()
            zt, time, target, weight = formula(z0, noise, t, alpha_bar[t])
            errors.append(weight * ((target - unet(zt, time).sample) ** 2).mean())
    torch.testing.assert_close(loss, torch.stack([error.squeeze() for error in errors]).mean(), rtol=1e-5, atol=0)


def test_noise_depends_only_on_the_index_of_the_sample(module):
    moments = torch.randn(4, 4, 4, 4)
    full = module(latents_of(moments, [0, 1, 2, 3]), PROGRESS)["loss"]
    torch.manual_seed(999)
    halves = [module(latents_of(moments[part], part), PROGRESS)["loss"] for part in ([3, 0], [2, 1])]
    torch.testing.assert_close(full, sum(halves) / 2)
    assert module(latents_of(moments, [4, 5, 6, 7]), PROGRESS)["loss"] != full


def test_validation_uses_the_same_noise_every_time(module):
    task = object.__new__(denoiser.DenoiserTask)
    task._batch = 2
    moments = torch.randn(3, 4, 4, 4)
    scores = []
    for division in ([[0, 1], [2]], [[2, 0], [1]]):
        batches = [latents_of(moments[part], part) for part in division]
        task._latents = type("LatentData", (), {"val_batches": lambda self, *_, batches=batches: batches})()
        scores.append(task.validate(module, Accelerator(cpu=True))["loss"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_labels_are_dropped_with_the_configured_probability(with_classes):
    """A tenth of the labels is replaced by the null class, 3, as decided by the generator of each image."""
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, noisy, t, condition):
            seen.extend(condition.labels.tolist())
            return predict(with_classes, noisy, t, condition)

    spy = Spy()
    spy.add_module("inner", with_classes)  # whose dtype counts
    module = DenoiserLoss(spy, build_objective(DENOISER), null_class=3, label_dropout=0.1)
    batch = latents_of(torch.randn(600, 4, 4, 4), list(range(600)))
    module(batch, PROGRESS)
    dropped = [index for index, label in enumerate(seen) if label == 3]
    assert [label for label in seen if label != 3] == [index % 3 for index in range(600) if index not in dropped]
    assert 36 <= len(dropped) <= 84  # 60 +- 3.3 standard deviations
    assert batch.classes.max() == 2

    again, seen = seen, []
    module(latents_of(torch.randn(2, 4, 4, 4), [dropped[0], 1]), PROGRESS)
    assert seen == [3, again[1]]


def test_prediction_depends_on_the_class_only_with_classes(module, with_classes):
    assert module.unet.config.num_class_embeds is None
    z = torch.randn(1, *SHAPE)
    predicted = [with_classes(z, 10, torch.tensor([label])).sample for label in range(4)]
    assert all(not torch.equal(predicted[0], other) for other in predicted[1:])


def test_every_level_needs_an_attention_flag():
    with pytest.raises(ValueError, match=r"denoiser\.attention: has 1 levels but denoiser\.channels has 2"):
        UNetDenoiserConfig(loop=LOOP, channels=(32, 32), attention=(True,))
