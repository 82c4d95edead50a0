"""Sampling: solve the probability-flow ODE from noise to a latent, then decode the latents to 8-bit images.

All solvers are deterministic given the initial noise, so an image is a function of the network, its initial noise and
its class. DDIM (Song et al. 2021, η = 0) with 100 steps is the paper's solver. DPM-Solver++ (Lu et al. 2022, second
order, multistep) solves the same equation equally well in 20 to 25 steps. A flow is solved by Euler's method or
DPM-Solver++.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mgcc_dist.common.finite import require_finite
from mgcc_dist.diffusion.condition import Condition
from mgcc_dist.diffusion.config import Solver
from mgcc_dist.diffusion.denoiser import predict
from mgcc_dist.diffusion.noise import RngStream, make_generators
from mgcc_dist.diffusion.objective import build_solver
from mgcc_dist.diffusion.pipeline import LatentDiffusionModel

GOLDEN_RATIO = (5**0.5 - 1) / 2


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Return noise, float32 [B,C,h,w] on the CPU; image i gets its noise from the generator of (seed, i)."""
    return randn_tensor((len(indices), *shape), make_generators(seed, RngStream.SAMPLE, indices))


def class_of_index(index: int, counts: Sequence[int]) -> int:
    """Return the class label of image `index`, given the number of training images per class.

    The fractional parts of multiples of the golden ratio fill [0, 1) evenly, and each class owns a part of [0, 1) equal
    to its share of the training set. Any consecutive range of images thus has nearly the class mix of the training set,
    whatever the total number of images.
    """
    point = index * GOLDEN_RATIO % 1 * sum(counts)
    return int(np.searchsorted(np.cumsum(counts), point, side="right"))


class Sampler:
    """Generates images from a trained model.

    Args:
        guidance: scale of classifier-free guidance, for class-conditional models: 1 samples the learned class
            distributions, 0 ignores the classes, higher values exaggerate their differences. Values other than 0 and 1
            double the cost.
        bf16: use bfloat16 weights; the solver stays in float32.
        compile: compile both networks (with CUDA graphs on a GPU), of a plugin only the denoiser. This takes about a
            minute, and all batches should have the same size.
    """

    def __init__(
        self,
        model: LatentDiffusionModel,
        solver: Solver,
        steps: int,
        guidance: float,
        bf16: bool,
        compile: bool,
        device: torch.device,
    ) -> None:
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.device = device
        self.steps = steps
        self.guidance = guidance
        self.null_class = len(model.classes)
        self._unet, self._vae = (
            # `.type` instead of `.to(dtype)`, at which diffusers warns although no module has to stay in float32.
            network.type(self.dtype).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            for network in (model.unet, model.vae)
        )
        self._scheduler = build_solver(solver, model.scheduler)
        self._cuda_graphs = compile and device.type == "cuda"
        if compile:
            mode = "reduce-overhead" if self._cuda_graphs else "default"
            self._unet.compile(mode=mode, dynamic=False)
            if isinstance(self._vae, AutoencoderKL):
                self._vae.decoder.compile(mode=mode, dynamic=False)

    @torch.inference_mode()
    def generate(
        self, noise: Tensor, condition: Condition | None = None, indices: Sequence[int] | None = None
    ) -> np.ndarray:
        """Return images uint8 [B,S,S] for initial noise [B,C,h,w].

        `condition` holds their classes and masks, as far as the model has any; `indices` name the images in an error.

        Raises:
            UserError: the network's result is not finite.
        """
        z = noise.to(self.device, memory_format=torch.channels_last)
        condition = (condition or Condition()).to(self.device)
        self._scheduler.set_timesteps(self.steps)
        # The scheduler reads its coefficients on the CPU, the network its timesteps on the device: no synchronization.
        timesteps = self._scheduler.timesteps
        for t, device_t in zip(timesteps, timesteps.to(self.device), strict=True):
            z = self._scheduler.step(self._predict(z, device_t, condition), t, z).prev_sample
        decoded = self._vae.decode((z / self._vae.config.scaling_factor).to(self.dtype)).sample
        items = [f"image {index}" for index in (range(len(noise)) if indices is None else indices)]
        require_finite(decoded, "sampling", items, "Sample with precision no, or train with a lower learning rate.")
        grey = (decoded[:, 0].float() / 2 + 0.5).clamp(0, 1) * 255
        return grey.round().to(torch.uint8).cpu().numpy()

    def _predict(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the prediction, float32 [B,C,h,w], with classifier-free guidance if there is a condition."""
        if self._cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        z = z.to(self.dtype)
        null = condition.null(self.null_class)
        if condition.is_empty or self.guidance in (0, 1):
            return predict(self._unet, z, t, condition if self.guidance else null).float()
        both = predict(self._unet, torch.cat([z, z]), t, Condition.cat([condition, null])).float()
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)
