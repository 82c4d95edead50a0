"""Second stage, Eq. 2: a U-Net that predicts the noise in diffused latents.

A latent z₀ of the frozen autoencoder, drawn from its stored posterior (`latents.py`), is diffused over T = 1000 steps,
z_t = √ᾱ_t z₀ + √(1-ᾱ_t) ε, and diffusers' `UNet2DModel` learns L = E ||ε - ε_θ(z_t, t)||² (the mean over elements,
which only changes its unit).

With `classes` it also learns ε_θ(z_t, t, class), and ε_θ(z_t, t) by the same network: a share of the labels, chosen at
random, is replaced by one that stands for "any" (classifier-free guidance, Ho & Salimans 2022).
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.common.errors import UserError
from mgcc_dist.diffusion.config import DenoiserConfig
from mgcc_dist.diffusion.latents import LatentBatch, Latents
from mgcc_dist.diffusion.noise import Draw, generators
from mgcc_dist.diffusion.weights import load_weights
from mgcc_dist.train.schedules import Progress


def build(config: DenoiserConfig, shape: tuple[int, int, int], classes: int) -> UNet2DModel:
    """A new denoiser with random weights, for latents of `shape` [C,h,w] of images of so many classes."""
    channels, size, _ = shape
    down = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention]
    up = ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)]
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        layers_per_block=config.layers,
        norm_num_groups=config.norm_groups,
        attention_head_dim=config.head_channels,
        num_class_embeds=classes + 1 if config.classes else None,  # the last is "any"
    )


def load(config: DenoiserConfig, latents: Latents, folder: Path) -> UNet2DModel:
    """The denoiser of `latents` whose weights training saved in `folder`.

    Raises:
        UserError: the weights are of another architecture, or were trained on latents of another autoencoder.
    """
    path = folder / "model.safetensors"
    unet = build(config, latents.shape, len(latents.classes))
    trained_on = load_weights(unet, path).get("autoencoder")
    if trained_on != latents.autoencoder:
        raise UserError(
            f"{path} was trained on latents of the autoencoder {trained_on}, not of {latents.autoencoder}; "
            f"delete {folder.parent} to train it again, or put its autoencoder back"
        )
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


class DenoiserLoss(nn.Module):
    """What the loop trains: the U-Net with the loss of Eq. 2."""

    def __init__(self, unet: UNet2DModel, schedule: DDPMScheduler, label_dropout: float) -> None:
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.label_dropout = label_dropout

    def forward(self, batch: LatentBatch, progress: Progress) -> dict[str, Tensor]:
        draws = generators(progress.seed, Draw.DIFFUSION, batch.positions.tolist())
        return {"loss": self.errors(batch, draws).mean()}

    def errors(self, batch: LatentBatch, draws: list[torch.Generator]) -> Tensor:
        """[B]: mean over the latent of (ε - ε_θ(z_t, t))² for each image.

        z₀, t, ε and whether the label is dropped come, in this order, from the image's draws.
        """
        latents = batch.sample(draws)
        last = self.schedule.config.num_train_timesteps
        t = torch.cat([torch.randint(last, (1,), generator=draw) for draw in draws]).to(latents.device)
        noise = randn_tensor(latents.shape, draws, latents.device, latents.dtype)
        noisy = self.schedule.add_noise(latents, noise, t)
        predicted = self.unet(noisy.to(self.unet.dtype), t, self._labels(batch, draws)).sample
        return F.mse_loss(predicted, noise.to(predicted.dtype), reduction="none").mean(dim=(1, 2, 3))

    def _labels(self, batch: LatentBatch, draws: list[torch.Generator]) -> Tensor | None:
        """[B]: the classes, some replaced by "any"; None without classes."""
        if self.unet.config.num_class_embeds is None:
            return None
        dropped = torch.cat([torch.rand(1, generator=draw) for draw in draws]) < self.label_dropout
        return batch.classes.masked_fill(dropped.to(batch.classes.device), self.unet.config.num_class_embeds - 1)


class DenoiserTask:
    """Denoiser, training latents and held-out latents, for `train.loop.fit`."""

    name = "denoiser"
    best_metric = "loss"
    best_is_higher = False

    def __init__(self, config: DenoiserConfig, latents: Latents, accelerator: Accelerator) -> None:
        unet = build(config, latents.shape, len(latents.classes))
        self.module: nn.Module = DenoiserLoss(unet, build_schedule(config), config.label_dropout)
        self.loader = latents.training(config.batch, config.loop.seed, accelerator)
        self._latents = latents
        self._batch = config.batch

    def after_step(self, progress: Progress) -> None:
        pass

    def validate(self, module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Loss of Eq. 2 on the held-out images, with the same time steps and noise at every validation."""
        assert isinstance(module, DenoiserLoss)
        losses = []
        for batch in self._latents.held_out(self._batch, accelerator):
            places = batch.positions.tolist()
            with accelerator.autocast():
                errors = module.errors(batch.to(accelerator.device), generators(0, Draw.VALIDATION, places))
            losses += list(zip(places, errors.tolist(), strict=True))
        return {"loss": float(np.mean([loss for _, loss in sorted(gather_object(losses))]))}

    def header(self) -> dict[str, str]:
        return {"program": "ldm", "stage": self.name, "autoencoder": self._latents.autoencoder}

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        assert isinstance(module, DenoiserLoss)
        return module.unet.state_dict()
