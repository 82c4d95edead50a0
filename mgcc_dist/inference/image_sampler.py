"""Sample synthetic images from a trained latent diffusion model: `mgcc.load_pipeline("out/ldm").sample(8)`.

Image i of a seed is the same whatever the number of images and the batch size, up to rounding.
"""

import math
import numbers
from pathlib import Path
from typing import get_args

import torch
from PIL import Image

from mgcc_dist.common.errors import UserError
from mgcc_dist.diffusion import pipeline
from mgcc_dist.diffusion.condition import Condition
from mgcc_dist.diffusion.sampler import Sampler, Solver, class_of_index, initial_noise
from mgcc_dist.inference.predictor import default_device


class ImageSampler:
    """A trained autoencoder and denoiser.

    Args:
        model: both networks with their noise schedule.
        device: where they run.
    """

    def __init__(self, model: pipeline.LatentDiffusionModel, device: torch.device) -> None:
        self.model = model
        self.device = device

    @property
    def classes(self) -> list[str]:
        """Names of the classes that can be sampled; empty for a model without classes."""
        return list(self.model.classes)

    def sample(
        self,
        count: int,
        seed: int = 0,
        class_name: str | None = None,
        solver: Solver = "dpm_solver++",
        steps: int = 25,
        guidance: float = 1.0,
        batch: int = 16,
    ) -> list[Image.Image]:
        """Sample `count` grey images.

        Args:
            count: number of images.
            seed: another seed gives other images.
            class_name: one of `classes`; None samples the training set's mix of classes.
            solver: "dpm_solver++" (about 25 steps), "ddim" (the paper's, 100 steps), or "euler" for a flow.
            steps: denoising steps.
            guidance: classifier-free guidance of a model with classes; 1 samples them as learned, 0 ignores them. A
                model with masks samples without a mask; `mgcc ldm` samples pairs.
            batch: images in one forward pass, as memory allows.

        Raises:
            UserError: a number is out of range, or the model can't use that solver or does not have that class.
        """
        for name, value, least in (("count", count, 1), ("steps", steps, 1), ("batch", batch, 1), ("seed", seed, 0)):
            if not isinstance(value, numbers.Integral) or value < least:
                kind = "a positive integer" if least else "an integer from 0"
                raise UserError(f"sample: {name} must be {kind}, got {value!r}")
        if solver not in get_args(Solver):
            raise UserError(f"sample: solver must be one of {', '.join(get_args(Solver))}, got {solver!r}")
        if not 0 <= guidance < math.inf:
            raise UserError(f"sample: guidance must be a number from 0, got {guidance}")
        trained = self.model.scheduler.config.num_train_timesteps
        if steps > trained:
            raise UserError(f"sample: steps must be at most {trained}, the model's number of timesteps, got {steps}")
        if guidance != 1 and not self.classes:
            raise UserError(f"sample: guidance {guidance:g} needs a model with classes. Leave it at 1.")
        if class_name is not None and class_name not in self.classes:
            known = ", ".join(self.classes) or "none: it was trained without classes"
            raise UserError(f"sample: the model has no class {class_name!r}. Its classes: {known}.")
        sampler = Sampler(self.model, solver, steps, guidance, bf16=False, compile=False, device=self.device)
        images: list[Image.Image] = []
        for start in range(0, count, batch):
            indices = range(start, min(start + batch, count))
            noise = initial_noise(seed, indices, self.model.latent_shape)
            images += map(Image.fromarray, sampler.generate(noise, self._condition(indices, class_name), indices))
        return images

    def _condition(self, indices: range, class_name: str | None) -> Condition:
        size = self.model.latent_shape[-1]
        mask = torch.zeros(len(indices), 1, size, size) if self.model.masks else None  # any mask
        if not self.classes:
            return Condition(None, mask)
        if class_name is not None:
            return Condition(torch.full((len(indices),), self.classes.index(class_name)), mask)
        counts = list(self.model.classes.values())
        return Condition(torch.tensor([class_of_index(index, counts) for index in indices]), mask)


def load_pipeline(folder: str | Path, device: str | torch.device | None = None) -> ImageSampler:
    """Load a trained latent diffusion model for sampling.

    Args:
        folder: the output folder of `ldm`, or the `pipeline/` folder in it.
        device: None takes the accelerator if there is one, else the CPU.

    Raises:
        UserError: the folder does not hold a complete pipeline.
    """
    folder = Path(folder)
    if (folder / "pipeline").is_dir():
        folder = folder / "pipeline"
    return ImageSampler(pipeline.load(folder), torch.device(device) if device else default_device())
