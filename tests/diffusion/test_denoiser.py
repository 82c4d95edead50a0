"""The second stage: Eq. 2, its noise, the frozen autoencoder."""

import copy

import pytest
import torch
from accelerate import Accelerator
from tiny_ldm import DENOISER, LOOP, PROGRESS, batch_of

from mgcc_dist.diffusion import denoiser
from mgcc_dist.diffusion.denoiser import DenoiserConfig, DenoiserLoss, FrozenAutoencoder
from mgcc_dist.diffusion.noise import Draw, generators


@pytest.fixture
def module(vae, unet, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    frozen = FrozenAutoencoder(tmp_path / "vae", Accelerator(cpu=True))
    return DenoiserLoss(unet, denoiser.build_schedule(DENOISER), frozen)


def test_loss_is_equation_2(module):
    unet, vae = module.unet.double(), module.autoencoder.vae.double()
    images = torch.rand(3, 1, 16, 16, dtype=torch.float64) * 2 - 1
    places = [11, 2, 30]
    loss = module(batch_of(images, places), PROGRESS)["loss"]

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    errors = []
    with torch.no_grad():
        for image, draw in zip(images, generators(PROGRESS.seed, Draw.DIFFUSION, places), strict=True):
            posterior = vae.encode(image[None]).latent_dist
            z0 = 1.7 * (posterior.mean + posterior.std * torch.randn(1, 2, 4, 4, generator=draw, dtype=torch.float64))
            t = torch.randint(1000, (1,), generator=draw)
            noise = torch.randn(1, 2, 4, 4, generator=draw, dtype=torch.float64)
            zt = alpha_bar[t].sqrt() * z0 + (1 - alpha_bar[t]).sqrt() * noise
            errors.append(((noise - unet(zt, t).sample) ** 2).mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-6, atol=0)


def test_an_images_noise_depends_on_its_place_alone(module):
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    whole = module(batch_of(images, [0, 1, 2, 3]), PROGRESS)["loss"]
    torch.manual_seed(999)
    halves = [module(batch_of(images[part], part), PROGRESS)["loss"] for part in ([3, 0], [2, 1])]
    torch.testing.assert_close(whole, sum(halves) / 2)
    assert module(batch_of(images, [4, 5, 6, 7]), PROGRESS)["loss"] != whole


def test_autoencoder_is_neither_saved_nor_trained_nor_copied(module):
    assert all(name.startswith("unet.") for name in module.state_dict())
    before = copy.deepcopy(module.autoencoder.vae.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module.train()
    module(batch_of(torch.rand(2, 1, 16, 16), [0, 1]), PROGRESS)["loss"].backward()
    optimizer.step()
    assert not module.autoencoder.vae.training
    for name, tensor in module.autoencoder.vae.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert copy.deepcopy(module).autoencoder is module.autoencoder


def test_validation_repeats_its_noise(module):
    task = object.__new__(denoiser.DenoiserTask)
    images = torch.rand(3, 1, 16, 16)
    divisions = ([[0, 1], [2]], [[2, 0], [1]])
    scores = []
    for division in divisions:
        batches = [batch_of(images[part], part) for part in division]
        task._held_out = type("Once", (), {"batches": lambda self, batches=batches: batches})()
        scores.append(task.validate(module, Accelerator(cpu=True))["loss"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_a_level_without_its_attention_flag_is_refused():
    with pytest.raises(ValueError, match=r"denoiser\.attention has 1 levels but denoiser\.channels has 2"):
        DenoiserConfig(loop=LOOP, channels=(32, 32), attention=(True,))
