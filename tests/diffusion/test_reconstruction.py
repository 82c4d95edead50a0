"""Optional terms of the autoencoder's loss: known values, and which network each of them trains."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from monai.networks.nets import PatchDiscriminator
from tiny_ldm import PROGRESS, batch_of
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from mgcc_dist.common.errors import UserError
from mgcc_dist.diffusion.autoencoder import AutoencoderLoss, AutoencoderTask
from mgcc_dist.diffusion.config import AdversarialConfig, ReconstructionConfig
from mgcc_dist.diffusion.reconstruction import FeatureLoss, SsimLoss, spectral_loss
from mgcc_dist.inference.encoders import load_feature_maps


class Gradients(nn.Module):
    """Differences of neighboring pixels, as a list of one map of two channels."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.scale * x
        return [torch.cat([x[:, :, 1:, 1:] - x[:, :, :-1, 1:], x[:, :, 1:, 1:] - x[:, :, 1:, :-1]], dim=1)]


@pytest.mark.parametrize("layers", [1, 3])
def test_least_size_of_the_discriminator_leaves_one_patch(layers):
    config = AdversarialConfig(layers=layers)
    network = PatchDiscriminator(2, channels=8, in_channels=1, num_layers_d=layers, norm=("GROUP", {"num_groups": 8}))
    assert network(torch.zeros(1, 1, config.least_size, config.least_size))[-1].shape[-1] == 1
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 1, config.least_size - 1, config.least_size - 1))


@pytest.fixture
def images():
    return torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_ssim_matches_torchmetrics(images):
    other = (images + 0.3 * images.flip(0)).clamp(-1, 1)
    # They leave out borders of different width.
    expected = structural_similarity_index_measure((other + 1) / 2, (images + 1) / 2, data_range=1.0)
    assert SsimLoss()(other, images).item() == pytest.approx(1 - expected.item(), rel=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert SsimLoss()(images, images).item() == pytest.approx(0, abs=1e-6)


def test_spectral_term_of_half_the_contrast_is_20_log10_of_2_wherever_the_detail_is(images):
    assert spectral_loss(images, images) == 0
    assert spectral_loss(images / 2, images).item() == pytest.approx(20 * math.log10(2), rel=1e-2)
    large = images.repeat(1, 1, 2, 2)
    moved = large.clone()
    moved[..., :32, :32], moved[..., 32:, 32:] = large[..., :32, :32] / 2, large[..., 32:, 32:] * 2
    assert spectral_loss(moved, large).item() > 1.5  # the mean spectrum of both is nearly the same


def test_feature_term_is_the_squared_distance_of_unit_vectors_and_trains_only_the_autoencoder(images):
    network = Gradients()
    term = FeatureLoss(network)
    assert term(images, images) == 0
    assert term(images * 0.5, images).item() == pytest.approx(0, abs=1e-6)  # unit length
    assert term(-images, images).item() == pytest.approx(4, rel=1e-3)  # opposite directions
    reconstruction = images.flip(2).requires_grad_()
    term(reconstruction, images).backward()
    assert reconstruction.grad.abs().sum() > 0
    assert network.scale.grad is None
    assert copy.deepcopy(term) is term


def test_discriminator_and_autoencoder_each_learn_from_their_own_loss(vae, images):
    """Before `start` the discriminator gets gradients of zero, which DDP and ZeRO need, and changes nothing."""
    config = ReconstructionConfig(adversarial=AdversarialConfig(weight=0.5, start=1, channels=8, layers=1))
    module = AutoencoderLoss(vae, 0.0, config)

    def gradients(step, *names):
        module.zero_grad()
        losses = module(batch_of(images, [0, 1]), replace(PROGRESS, step=step))
        sum(losses[name] for name in names).backward()
        return losses, *(
            sum(p.grad.abs().sum().item() for p in network.parameters() if p.grad is not None)
            for network in (vae, module.adversary)
        )

    losses, of_vae, of_discriminator = gradients(0, "loss")
    assert losses["loss"] == losses["mse"]
    assert of_vae > 0 == of_discriminator
    assert all(parameter.grad is not None for parameter in module.parameters())

    losses, of_vae, of_discriminator = gradients(1, "loss")
    torch.testing.assert_close(losses["loss"], losses["mse"] + 0.5 * losses["adversarial"] + losses["discriminator"])
    assert of_vae > 0 < of_discriminator
    _, of_vae, of_discriminator = gradients(1, "adversarial")
    assert of_vae > 0 == of_discriminator
    _, of_vae, of_discriminator = gradients(1, "discriminator")
    assert of_vae == 0 < of_discriminator

    task = object.__new__(AutoencoderTask)
    assert task.network(module).state_dict().keys() == vae.state_dict().keys()


def test_least_squares_losses_of_the_discriminator(vae, images):
    """A discriminator that answers 0.25 everywhere: real images should give 1, reconstructions 0."""
    config = ReconstructionConfig(adversarial=AdversarialConfig(weight=1, channels=8, layers=1))
    adversary = AutoencoderLoss(vae, 0.0, config).adversary
    adversary.discriminator = nn.Sequential(Constant())
    losses = adversary(images, images, step=0)
    assert losses["adversarial"].item() == pytest.approx(0.75**2)
    assert losses["discriminator"].item() == pytest.approx((0.75**2 + 0.25**2) / 2)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(0.25))

    def forward(self, x):
        return self.answer.expand(1, 1, 4, 4)


def test_networks_that_return_no_feature_maps_are_refused(tmp_path):
    def scripted(module):
        torch.jit.script(module).save(tmp_path / "network.pt")
        return str(tmp_path / "network.pt")

    option = "autoencoder.losses.network"
    [maps] = load_feature_maps(option, scripted(Gradients()), 16)(torch.zeros(3, 1, 16, 16))
    assert maps.shape == (3, 2, 15, 15)
    with pytest.raises(UserError, match=rf"{option}: .*network\.pt returns \[512\] for 2 images\. Use a network that"):
        load_feature_maps(option, scripted(nn.Flatten(0)), 16)
    with pytest.raises(UserError, match=rf"{option}: .*network\.pt fails on images: "):
        load_feature_maps(option, scripted(nn.Linear(99, 1)), 16)
    with pytest.raises(UserError, match=rf"{option}: .*nowhere: does not exist"):
        load_feature_maps(option, str(tmp_path / "nowhere"), 16)
    with pytest.raises(ValueError, match=r"losses\.features and losses\.network: expected both or neither"):
        ReconstructionConfig(features=0.1)
