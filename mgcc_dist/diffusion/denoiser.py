"""Second stage, Eq. 2: a U-Net that predicts the noise in diffused latents.

A latent z₀ = scale · E(x) of the frozen autoencoder is diffused over T = 1000 steps, z_t = √ᾱ_t z₀ + √(1-ᾱ_t) ε, and
diffusers' `UNet2DModel` learns L = E ||ε - ε_θ(z_t, t)||² (the mean over elements, which only changes its unit).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.config import PositiveFloat, PositiveInt
from mgcc_dist.data.loader import Batch
from mgcc_dist.diffusion.images import Images
from mgcc_dist.diffusion.noise import Draw, generators
from mgcc_dist.schedules import Progress
from mgcc_dist.train.loop import LoopConfig


@dataclass(frozen=True)
class DenoiserConfig:
    loop: LoopConfig
    """how it is trained (paper: adamw, learning rate 1e-4, 1000 epochs)"""
    channels: tuple[PositiveInt, ...] = (224, 448, 672, 896)
    """channels of each level; every level after the first halves the side (paper: silent; the unconditional latent
    diffusion of [10] on 64x64 latents: 224, 448, 672, 896)"""
    attention: tuple[bool, ...] = (False, True, True, True)
    """which levels have self-attention ([10]: at sides 32, 16 and 8)"""
    layers: PositiveInt = 2
    """residual blocks a level ([10]: 2)"""
    norm_groups: PositiveInt = 32
    """groups of the group normalisation; divides every one of `channels`"""
    head_channels: PositiveInt = 32
    """channels of an attention head ([10]: 32)"""
    diffusion_steps: PositiveInt = 1000
    """T, the steps from image to noise (paper: 1000)"""
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    """how the noise grows, by diffusers' names (paper: silent; [10] and medfusion: scaled_linear)"""
    beta_start: PositiveFloat = 0.00085
    """variance added by the first step (paper: silent; Stable Diffusion: 0.00085; medfusion: 0.002)"""
    beta_end: PositiveFloat = 0.012
    """variance added by the last step (paper: silent; Stable Diffusion: 0.012; medfusion: 0.02, with which so little
    signal is left at t = T that a small error of the noise there decides the brightness of the whole image)"""
    batch: PositiveInt = 4
    """images a rank and micro-step (paper: 4)"""

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.channels):
            raise ValueError(
                f"denoiser.attention has {len(self.attention)} levels but denoiser.channels has {len(self.channels)}"
            )
        for width in self.channels:
            for key in ("norm_groups", "head_channels"):
                if width % getattr(self, key):
                    raise ValueError(f"denoiser.channels: {width} is not a multiple of denoiser.{key}")


def build(config: DenoiserConfig, vae: AutoencoderKL) -> UNet2DModel:
    """A new denoiser with random weights, for latents of `vae`."""
    latent_size = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    down = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention]
    up = ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)]
    return UNet2DModel(
        sample_size=latent_size,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=config.channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        layers_per_block=config.layers,
        norm_num_groups=config.norm_groups,
        attention_head_dim=config.head_channels,
    )


def load(config: DenoiserConfig, vae: AutoencoderKL, folder: Path) -> UNet2DModel:
    """The denoiser of `vae`'s latents whose weights training saved in `folder`."""
    unet = build(config, vae)
    unet.load_state_dict(load_file(folder / "model.safetensors"))
    return unet.eval()


def build_schedule(config: DenoiserConfig) -> DDPMScheduler:
    """The forward process: q(z_t | z_0)."""
    return DDPMScheduler(
        num_train_timesteps=config.diffusion_steps,
        beta_schedule=config.schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        clip_sample=False,  # latents, unlike images, have no bounds
        timestep_spacing="trailing",  # sampling starts at t = T, where training saw (nearly) pure noise
    )


class FrozenAutoencoder:
    """E(x) with fixed weights.

    Not an nn.Module, and its own copy: so a module may hold it and the autoencoder's weights still stay out of the
    state dict, DDP's buckets, the optimizer and the EMA's copy.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.vae = AutoencoderKL.from_pretrained(folder).requires_grad_(False).eval().to(accelerator.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenAutoencoder":
        return self

    @torch.no_grad()
    def encode(self, images: Tensor, draws: list[torch.Generator]) -> Tensor:
        """Images [B,1,H,W] in [-1, 1] -> latents [B,C,h,w] of unit variance, drawn from q(z|x)."""
        posterior = self.vae.encode(images).latent_dist
        return self.vae.config.scaling_factor * posterior.sample(draws)


class DenoiserLoss(nn.Module):
    """What the loop trains: the U-Net with the loss of Eq. 2."""

    def __init__(self, unet: UNet2DModel, schedule: DDPMScheduler, autoencoder: FrozenAutoencoder) -> None:
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.autoencoder = autoencoder

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Loss of `batch.images` [B,1,H,W] in [-1, 1]."""
        draws = generators(progress.seed, Draw.DIFFUSION, batch.positions.tolist())
        return {"loss": self.errors(batch.images, draws).mean()}

    def errors(self, images: Tensor, draws: list[torch.Generator]) -> Tensor:
        """[B]: mean over the latent of (ε - ε_θ(z_t, t))² for each image; z₀, t and ε come from the image's draws."""
        latents = self.autoencoder.encode(images, draws)
        last = self.schedule.config.num_train_timesteps
        t = torch.cat([torch.randint(last, (1,), generator=draw) for draw in draws]).to(images.device)
        noise = randn_tensor(latents.shape, draws, latents.device, latents.dtype)
        noisy = self.schedule.add_noise(latents, noise, t)
        predicted = self.unet(noisy.to(self.unet.dtype), t).sample
        return F.mse_loss(predicted, noise.to(predicted.dtype), reduction="none").mean(dim=(1, 2, 3))


class DenoiserTask:
    """Denoiser, training images and held-out images, for `train.loop.fit`."""

    name = "denoiser"
    best_metric = "loss"
    best_is_higher = False

    def __init__(self, config: DenoiserConfig, images: Images, autoencoder: Path, accelerator: Accelerator) -> None:
        frozen = FrozenAutoencoder(autoencoder, accelerator)
        self.module: nn.Module = DenoiserLoss(build(config, frozen.vae), build_schedule(config), frozen)
        self.loader = images.training(config.batch, config.loop.seed, accelerator)
        self._held_out = images.held_out(config.batch, accelerator)

    def after_step(self, progress: Progress) -> None:
        pass

    def validate(self, module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Loss of Eq. 2 on the held-out images, with the same time steps and noise at every validation."""
        assert isinstance(module, DenoiserLoss)
        losses = []
        for batch in self._held_out.batches():
            places = batch.positions.tolist()
            with accelerator.autocast():
                errors = module.errors(batch.images.to(accelerator.device), generators(0, Draw.VALIDATION, places))
            losses += list(zip(places, errors.tolist(), strict=True))
        return {"loss": float(np.mean([loss for _, loss in sorted(gather_object(losses))]))}

    def header(self) -> dict[str, str]:
        return {"program": "ldm", "stage": self.name}

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        assert isinstance(module, DenoiserLoss)
        return module.unet.state_dict()
