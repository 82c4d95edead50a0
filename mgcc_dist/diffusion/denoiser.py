"""Second stage: a denoiser, trained on diffused latents.

A latent z₀ of the frozen autoencoder, sampled from its stored posterior (`latents.py`), is diffused to z_t, where t is
one of T = 1000 steps. The denoiser, by default diffusers' `UNet2DModel`, minimizes the paper's Eq. 2,
L = E ||ε - ε_θ(z_t, t)||² (as the mean over elements, which only changes the scale). `objective.py` describes what else
it can learn to predict.

With `classes` the same network learns both ε_θ(z_t, t, class) and the unconditional ε_θ(z_t, t): a random share of the
labels is replaced by a null class (classifier-free guidance, Ho & Salimans 2022). With `masks` it also gets the lesion
mask. Class and mask of an image are dropped together, and images whose mask is unknown are trained on without one.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.common.distributed import gather_by_index
from mgcc_dist.common.errors import UserError
from mgcc_dist.diffusion.condition import Condition
from mgcc_dist.diffusion.config import DENOISERS, DenoiserConfig
from mgcc_dist.diffusion.latents import LatentBatch, LatentData
from mgcc_dist.diffusion.noise import RngStream, make_generators
from mgcc_dist.diffusion.objective import Objective, build_objective
from mgcc_dist.diffusion.weights import load_weights
from mgcc_dist.train.schedules import Progress

DIFFUSERS_MODELS = (UNet2DModel, DiTTransformer2DModel)
"""models of diffusers that `predict` can call"""


class Denoiser(Protocol):
    """A module that predicts noise, velocity or flow (`objective.py`). `predict` calls it, and models of diffusers."""

    def __call__(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Return the prediction [B,C,h,w] for noisy latents [B,C,h,w], at `timestep`, [B] or a scalar for all."""


def build(config: DenoiserConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return a new denoiser with random weights, for latents of `shape` [C,h,w] and `classes` image classes.

    An implementation is called with the config, the shape and the number of class labels: the null class, the last one,
    counts too, and a denoiser without classes has 0. It returns a module for `predict`: a `Denoiser`, or one of the
    models in DIFFUSERS_MODELS, which keeps diffusers' files.
    """
    return DENOISERS.load(config)(config, shape, classes + 1 if config.classes else 0)


def predict(denoiser: nn.Module, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """Return what a denoiser predicts, [B,C,h,w]; the arguments are those of `Denoiser`."""
    if isinstance(denoiser, DIFFUSERS_MODELS):
        times, labels = timestep.expand(len(latents)), condition.labels
        if labels is None and isinstance(denoiser, DiTTransformer2DModel):  # it has at least one class
            labels = torch.zeros_like(times, dtype=torch.int64)
        return denoiser(condition.add_mask(latents), times, class_labels=labels).sample
    return denoiser(latents, timestep, condition)


def load(config: DenoiserConfig, latents: LatentData, folder: Path) -> nn.Module:
    """Return the denoiser of `latents` with the weights that the training loop saved in `folder`.

    Raises:
        UserError: the weights have a different architecture, or were trained on latents of a different autoencoder.
    """
    path = folder / "model.safetensors"
    unet = build(config, latents.shape, len(latents.classes))
    trained_on = load_weights(unet, path).get("autoencoder")
    if trained_on != latents.autoencoder:
        raise UserError(
            f"{path}: was trained on latents of autoencoder {trained_on}, not of {latents.autoencoder}. "
            f"Move {folder.parent} elsewhere to retrain it, or restore its autoencoder."
        )
    return unet.eval()


class DenoiserLoss(nn.Module):
    """The denoiser together with its training loss; by default that of Eq. 2.

    Args:
        null_class: label of the null class; None for an unconditional denoiser.
        label_dropout: share of the images without class and mask.
        masks: whether the denoiser gets the mask.
    """

    def __init__(
        self,
        unet: nn.Module,
        objective: Objective,
        null_class: int | None = None,
        label_dropout: float = 0.0,
        masks: bool = False,
    ) -> None:
        super().__init__()
        self.unet = unet  # checkpoints of all denoisers call it that
        self.objective = objective
        self.null_class = null_class
        self.label_dropout = label_dropout
        self.masks = masks

    def forward(self, batch: LatentBatch, progress: Progress) -> dict[str, Tensor]:
        generators = make_generators(progress.seed, RngStream.DIFFUSION, batch.offsets.tolist())
        return {"loss": self.sample_losses(batch, generators).mean()}

    def sample_losses(self, batch: LatentBatch, generators: list[torch.Generator]) -> Tensor:
        """Return the squared error of the prediction, mean over the latent, for each image [B].

        z₀, t, ε and the label dropout are drawn, in this order, from the image's own generator.
        """
        latents, objective = batch.sample(generators), self.objective
        draws = [torch.randint(objective.steps, (1,), generator=generator) for generator in generators]
        t = torch.cat(draws).to(latents.device)
        noise = randn_tensor(latents.shape, generators, latents.device, latents.dtype)
        noisy = objective.add_noise(latents, noise, t).to(next(self.unet.parameters()).dtype)
        predicted = predict(self.unet, noisy, objective.timestep(t), self._condition(batch, generators))
        target = objective.target(latents, noise, t).to(predicted.dtype)
        losses = F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
        weight = objective.weight(t)
        return losses if weight is None else losses * weight

    def _condition(self, batch: LatentBatch, generators: list[torch.Generator]) -> Condition:
        """Return the condition of the images, some of it dropped; nothing for an unconditional denoiser."""
        classes = None if self.null_class is None else batch.classes
        condition = Condition(classes, batch.mask.float() if self.masks else None)
        if condition.is_empty:
            return condition
        dropped = torch.cat([torch.rand(1, generator=generator) for generator in generators]) < self.label_dropout
        return condition.drop(dropped, self.null_class or 0)


def build_loss(config: DenoiserConfig, latents: LatentData) -> DenoiserLoss:
    """Return a new denoiser of `latents` with its loss."""
    denoiser = build(config, latents.shape, len(latents.classes))
    null_class = len(latents.classes) if config.classes else None
    return DenoiserLoss(denoiser, build_objective(config), null_class, config.label_dropout, config.mask_channels > 0)


class DenoiserTask:
    """Denoiser, training latents and validation latents, for `train.loop.fit`."""

    name = "denoiser"
    best_metric = "loss"
    best_is_higher = False

    def __init__(self, config: DenoiserConfig, latents: LatentData, accelerator: Accelerator) -> None:
        self.module: nn.Module = build_loss(config, latents)
        self.loader = latents.train_loader(config.batch, config.loop.seed, accelerator)
        self._latents = latents
        self._batch = config.batch

    def after_step(self, progress: Progress) -> None:
        pass

    def validate(self, module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Return the training loss on the validation images, with the same timesteps and noise at every validation."""
        assert isinstance(module, DenoiserLoss)
        losses = []
        for batch in self._latents.val_batches(self._batch, accelerator):
            indices = batch.offsets.tolist()
            generators = make_generators(0, RngStream.VALIDATION, indices)
            with accelerator.autocast():
                batch_losses = module.sample_losses(batch.to(accelerator.device), generators)
            losses += list(zip(indices, batch_losses.tolist(), strict=True))
        return {"loss": float(np.mean(gather_by_index(losses)))}

    def header(self) -> dict[str, str]:
        return {"program": "ldm", "stage": self.name, "autoencoder": self._latents.autoencoder}

    def network(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, DenoiserLoss)
        return module.unet
