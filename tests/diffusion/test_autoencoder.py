"""Autoencoder: loss, noise and normalization of the latents."""

import copy
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_ldm import AUTOENCODER, LOOP, PROGRESS, batch_of

from mgcc_dist.common.errors import UserError
from mgcc_dist.diffusion import autoencoder
from mgcc_dist.diffusion.autoencoder import AutoencoderLoss
from mgcc_dist.diffusion.config import KLAutoencoderConfig
from mgcc_dist.diffusion.noise import RngStream, make_generators
from mgcc_dist.evaluation.spectra import radial_log_spectrum


def test_loss_is_mse_plus_weighted_kl_per_pixel(vae):
    vae = vae.double()
    images = torch.rand(3, 1, 16, 16, dtype=torch.float64) * 2 - 1
    indices = [5, 0, 123]
    losses = AutoencoderLoss(vae, kl_weight=0.1)(batch_of(images, indices), PROGRESS)

    with torch.no_grad():
        mean, logvar = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)
        noise_generators = make_generators(PROGRESS.seed, RngStream.POSTERIOR, indices)
        noise = torch.stack([torch.randn(mean[0].shape, generator=g, dtype=torch.float64) for g in noise_generators])
        decoded = vae.decoder(vae.post_quant_conv(mean + torch.exp(logvar / 2) * noise))
        mse = ((decoded - images) ** 2).sum() / (3 * 16 * 16)
        kl = (0.5 * (mean**2 + torch.exp(logvar) - 1 - logvar)).sum() / (3 * 16 * 16)
    torch.testing.assert_close(losses["mse"], mse)
    torch.testing.assert_close(losses["kl"], kl)
    torch.testing.assert_close(losses["loss"], mse + 0.1 * kl)


def test_noise_depends_only_on_the_index_of_the_sample(vae):
    """The mean loss does not depend on how the samples are divided into batches."""
    module = AutoencoderLoss(vae, 0.0)
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    full = module(batch_of(images, [0, 1, 2, 3]), PROGRESS)["loss"]
    torch.manual_seed(999)
    halves = [module(batch_of(images[part], part), PROGRESS)["loss"] for part in ([3, 0], [2, 1])]
    torch.testing.assert_close(full, sum(halves) / 2)
    assert module(batch_of(images, [4, 5, 6, 7]), PROGRESS)["loss"] != full


def test_rng_streams_never_share_a_seed():
    seeds = [
        g.initial_seed() for seed in (0, 1) for stream in RngStream for g in make_generators(seed, stream, range(5))
    ]
    assert len(set(seeds)) == len(seeds)


@pytest.fixture
def uneven(vae):
    """An autoencoder whose latent channels differ in mean and standard deviation, as on BUSI."""
    with torch.no_grad():
        vae.quant_conv.weight[:2] *= torch.tensor([0.3, 4.0])[:, None, None, None]
        vae.quant_conv.bias[:2] = torch.tensor([-1.31, 0.7])
        vae.quant_conv.bias[2:] = torch.tensor([-3.0, -1.0])
    return vae


def test_latent_moments_match_sampled_latents(uneven):
    images = torch.rand(7, 1, 16, 16) * 2 - 1
    batches = [batch_of(images[part], part) for part in ([0, 1, 2], [3, 4, 5], [6])]
    mean, std = autoencoder.latent_moments(uneven, batches, Accelerator(cpu=True))
    with torch.no_grad():
        posterior = uneven.encode(images).latent_dist
        samples = torch.stack([posterior.sample(torch.Generator().manual_seed(i)) for i in range(1000)]).double()
    torch.testing.assert_close(mean, samples.mean(dim=(0, 1, 3, 4)), rtol=0.01, atol=0.01)
    torch.testing.assert_close(std, samples.transpose(0, 2).flatten(1).std(dim=1), rtol=0.01, atol=0)
    other_order = [batch_of(images[part], part) for part in ([6, 3], [0, 1, 2], [5, 4])]
    torch.testing.assert_close(autoencoder.latent_moments(uneven, other_order, Accelerator(cpu=True)), (mean, std))


def test_normalized_latents_have_mean_0_and_variance_1_and_decode_to_the_same_image(uneven):
    """A sample from the posterior decodes to the same image too, because the log-variance is scaled with the mean."""
    images = torch.rand(7, 1, 16, 16) * 2 - 1
    batches = [batch_of(images, list(range(7)))]
    before = copy.deepcopy(uneven)
    mean, std = autoencoder.latent_moments(uneven, batches, Accelerator(cpu=True))
    assert mean.abs().max() > 0.5
    autoencoder.normalize_latents(uneven, mean, std)

    measured = autoencoder.latent_moments(uneven, batches, Accelerator(cpu=True))
    torch.testing.assert_close(measured[0], torch.zeros(2).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(measured[1], torch.ones(2).double(), rtol=1e-6, atol=0)
    with torch.no_grad():
        for latent_of in (
            lambda posterior: posterior.mode(),
            lambda posterior: posterior.sample(make_generators(1, RngStream.SAMPLE, range(7))),
        ):
            old, new = (vae.decode(latent_of(vae.encode(images).latent_dist)).sample for vae in (before, uneven))
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)
    assert uneven.config.scaling_factor == 1.0
    assert {name: tensor.shape for name, tensor in uneven.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.state_dict().items()
    }


def test_default_latent_size_is_the_papers():
    config = KLAutoencoderConfig(loop=LOOP)
    assert 512 // config.downsampling == 64


def test_validation_reports_mse_psnr_and_spectral_distance(vae):
    images = torch.rand(3, 1, 16, 16) * 2 - 1
    task = object.__new__(autoencoder.AutoencoderTask)
    task._val_loader = type(
        "Loader", (), {"batches": lambda self: [batch_of(images[:2], [0, 1]), batch_of(images[2:], [2])]}
    )()
    task._val_groups = ["0", "1", "2"]
    scores = task.validate(AutoencoderLoss(vae, 0.0), Accelerator(cpu=True))
    decoded = autoencoder.reconstruct(vae, images).detach().double().numpy()
    mse = ((decoded - images.double().numpy()) ** 2).mean(axis=(1, 2, 3))
    assert scores["mse"] == pytest.approx(mse.mean(), rel=1e-5)
    real, rounded = radial_log_spectrum(images).mean(0), radial_log_spectrum(torch.from_numpy(decoded)).mean(0)
    assert scores["spectral_distance"] == pytest.approx((real - rounded).square().mean().sqrt().item(), rel=0.01)
    assert 0 < scores["spectral_floor"] < scores["spectral_distance"]
    # The peak-to-peak range of images in [-1, 1] is 2.
    assert scores["psnr"] == pytest.approx(np.mean([20 * math.log10(2 / math.sqrt(value)) for value in mse]), rel=1e-5)


def test_load_pretrained_restores_config_and_weights(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    loaded = autoencoder.load_pretrained(tmp_path)
    assert loaded.config.scaling_factor == 1.7
    assert "_name_or_path" not in loaded.config
    for name, tensor in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    copy.deepcopy(loaded)


@pytest.mark.parametrize(("size", "message"), [(18, "not a multiple of 4")])
def test_image_size_must_be_a_multiple_of_the_downsampling_factor(size, message):
    with pytest.raises(UserError, match=message):
        autoencoder.build(AUTOENCODER, size)


def test_channels_must_be_multiples_of_norm_groups():
    with pytest.raises(ValueError, match=r"12 is not a multiple of autoencoder\.norm_groups"):
        KLAutoencoderConfig(loop=LOOP, channels=(8, 12), norm_groups=8)
