"""An autoencoder that is not diffusers' `AutoencoderKL`, with those parts of its interface that the stages use."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from mgcc_dist.common.config import as_plain
from mgcc_dist.common.files import create_folder, write_json
from mgcc_dist.common.migration import with_version
from mgcc_dist.diffusion.config import AutoencoderConfig
from mgcc_dist.train.weights_file import save_weights

CONFIG = "config.json"


class EncodesAndDecodes(Protocol):
    """What a module must have to be an autoencoder."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance [B,C,h,w] of the latents of images [B,1,H,W] in [-1, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return images [B,1,H,W] in [-1, 1] of latents [B,C,h,w]."""


class CustomAutoencoder(nn.Module):
    """A module that `EncodesAndDecodes`, with latents normalized per channel: z = (x - latent_mean) / latent_std."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, network: EncodesAndDecodes, config: AutoencoderConfig, image_size: int) -> None:
        super().__init__()
        self.network: Any = network
        self.settings, self.image_size = config, image_size
        self.config = SimpleNamespace(scaling_factor=1.0)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(config.latent_channels, 1, 1))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.image_size // self.settings.downsampling
        return self.settings.latent_channels, size, size

    def encode(self, images: Tensor) -> AutoencoderKLOutput:
        mean, logvar = self.network.encode(images)
        moments = torch.cat([(mean - self.latent_mean) / self.latent_std, logvar - 2 * self.latent_std.log()], dim=1)
        return AutoencoderKLOutput(DiagonalGaussianDistribution(moments))

    def decode(self, latents: Tensor) -> DecoderOutput:
        return DecoderOutput(self.network.decode(latents * self.latent_std + self.latent_mean))

    def normalize(self, mean: Tensor, std: Tensor) -> None:
        """Replace the latent z by (z - mean) / std per channel; `mean` and `std` are [C]."""
        self.latent_mean += self.latent_std * mean.to(self.latent_mean)[:, None, None]
        self.latent_std *= std.to(self.latent_std)[:, None, None]

    def save_pretrained(self, folder: Path) -> None:
        """Write the config and the weights."""
        self.save_config(folder)
        save_weights(self.state_dict(), folder / SAFETENSORS_WEIGHTS_NAME)

    def save_config(self, folder: Path) -> None:
        """Write the config from which `autoencoder.load_pretrained` builds the module again."""
        create_folder(folder)
        content = {"autoencoder": as_plain(self.settings), "image_size": self.image_size}
        write_json(folder / CONFIG, with_version(content))
