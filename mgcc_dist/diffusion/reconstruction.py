"""Terms of the autoencoder's loss next to the MSE: they keep speckle and edges, which the MSE averages away.

- ssim: 1 - SSIM (Wang et al. 2004) of images in [0, 1], as computed by MONAI: luminance, contrast and structure in
  windows of 11x11 pixels.
- spectral: mean absolute difference in dB of the radial log power spectra (evaluation/spectra.py) of overlapping
  windows. It asks for as much detail at each place as the image has there, of every size, but not for the same detail.
- features: squared distance of the features of a frozen network, scaled to unit length at each pixel and averaged over
  pixels and levels (LPIPS, Zhang et al. 2018, Eq. 1, without its trained weights).
- adversarial: a discriminator of patches learns to tell reconstructions from images (PatchGAN, Isola et al. 2017), with
  the least-squares loss (Mao et al. 2017). As in Rombach et al. 2022 it joins after some steps.

The discriminator D and the autoencoder G are updated in the same step, each by its own loss. In the loss of G the
weights of D are constants; in that of D the reconstruction is. Both sums are in one backward pass of one module, so
DDP, ZeRO and gradient accumulation need nothing special. Adam works elementwise, so a parameter group for D
(`parameter_groups`) is an optimizer of its own, with the learning rate and betas of D.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.diffusion.config import AdversarialConfig, ReconstructionConfig
from mgcc_dist.evaluation.spectra import radial_log_spectrum

WINDOW = 32
"""pixels per side of the windows of the spectral term, which overlap by half"""
Term = Callable[[Tensor, Tensor], Tensor]
"""reconstruction and images [B,1,H,W] in [-1, 1] -> scalar"""


def build_terms(config: ReconstructionConfig, features: nn.Module | None) -> dict[str, tuple[float, Term]]:
    """Return weight and function of the terms with a weight, except the adversarial one; `features` is the network."""
    terms: dict[str, tuple[float, Term]] = {}
    if config.ssim:
        terms["ssim"] = config.ssim, SsimLoss()
    if config.spectral:
        terms["spectral"] = config.spectral, spectral_loss
    if config.features:
        assert features is not None
        terms["features"] = config.features, FeatureLoss(features)
    return terms


class SsimLoss:
    """1 - SSIM of images [B,1,H,W] in [-1,1], in float32."""

    def __init__(self) -> None:
        from monai.losses import SSIMLoss  # seconds to import

        self._loss = SSIMLoss(spatial_dims=2, data_range=1.0)

    def __call__(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        # Its variances are differences of large numbers, which autocast would round.
        with torch.autocast(images.device.type, enabled=False):
            loss: Tensor = self._loss((reconstruction.float() + 1) / 2, (images.float() + 1) / 2)
            return loss


def spectral_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return the mean difference in dB of the local power spectra of images [B,1,H,W]."""
    difference = radial_log_spectrum(_windows(reconstruction.float())) - radial_log_spectrum(_windows(images.float()))
    return difference.abs().mean()


def _windows(images: Tensor) -> Tensor:
    """Return windows [N,1,S,S] of images [B,1,H,W] without their mean, tapered to 0 at their borders."""
    size = min(WINDOW, *images.shape[-2:])
    parts = images.unfold(2, size, size // 2).unfold(3, size, size // 2).reshape(-1, 1, size, size)
    taper = torch.hann_window(size, device=images.device)
    taper = taper[:, None] * taper
    return (parts - parts.mean(dim=(2, 3), keepdim=True)) * (taper / taper.square().mean().sqrt())


class FeatureLoss:
    """Distance in the features of `network`, which stays frozen and is neither trained nor saved."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureLoss":
        return self  # the weights are constants

    def __call__(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        network = self._network.to(images.device)
        with torch.no_grad():
            expected = self._levels(network(images.float()))
        found = self._levels(network(reconstruction.float()))
        distances = [(x - y).square().sum(dim=1).mean() for x, y in zip(found, expected, strict=True)]
        return torch.stack(distances).mean()

    @staticmethod
    def _levels(maps: list[Tensor]) -> list[Tensor]:
        return [F.normalize(level.float(), dim=1, eps=1e-6) for level in maps]


class Adversary(nn.Module):
    """The discriminator with both losses, that of the autoencoder and its own."""

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        from monai.losses import PatchAdversarialLoss
        from monai.networks.nets import PatchDiscriminator

        self.config = config
        self.discriminator = PatchDiscriminator(
            spatial_dims=2,
            in_channels=1,
            channels=config.channels,
            num_layers_d=config.layers,
            # Not BatchNorm: losses must not depend on how the images are divided into batches and ranks.
            norm=("GROUP", {"num_groups": 8}),
        )
        self._loss = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)

    def forward(self, reconstruction: Tensor, images: Tensor, step: int) -> dict[str, Tensor]:
        """Return the losses `adversarial`, of the autoencoder, and `discriminator`; both are 0 before `start`."""
        dtype = next(self.discriminator.parameters()).dtype
        reconstruction, images = reconstruction.to(dtype), images.to(dtype)
        if step < self.config.start:  # DDP expects gradients of all parameters, if only zeros
            nothing = 0 * self.discriminator(images[:1])[-1].float().mean()
            return {"adversarial": nothing.detach(), "discriminator": nothing}
        with _constant(self.discriminator):
            judged = self.discriminator(reconstruction)[-1].float()
        real = self.discriminator(images)[-1].float()
        fake = self.discriminator(reconstruction.detach())[-1].float()
        real_loss = self._loss(real, target_is_real=True, for_discriminator=True)
        fake_loss = self._loss(fake, target_is_real=False, for_discriminator=True)
        return {
            "adversarial": self._loss(judged, target_is_real=True, for_discriminator=False),
            "discriminator": (real_loss + fake_loss) / 2,
        }

    def parameter_group(self) -> dict[str, Any]:
        """Return the discriminator's group for the optimizer, with the betas of Esser et al. 2021 for Adam."""
        factor = self.config.learning_rate_factor
        return {"params": list(self.parameters()), "lr_factor": factor, "betas": (0.5, 0.9), "weight_decay": 0.0}


@contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    """Leave the parameters of `module` out of graphs that are built inside the context."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
