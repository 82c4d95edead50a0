"""From noise to 8-bit images: the probability-flow ODE solved by DDIM or DPM-Solver++, then one batched decoding.

Both solvers start from noise and add none on the way, so an image is a function of the network, its starting noise and
its class. DDIM (Song et al. 2021, η = 0) is the paper's, with 100 steps. DPM-Solver++ (Lu et al. 2022, second order,
multistep) solves the same equation as well in 20 to 25.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mgcc_dist.diffusion.config import Solver
from mgcc_dist.diffusion.noise import Draw, generators
from mgcc_dist.diffusion.pipeline import TrainedModel

GOLDEN = (5**0.5 - 1) / 2


def starting_noise(seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """float32 [B,C,h,w] on the CPU; that of image i is drawn from the generator of (seed, i)."""
    return randn_tensor((len(indices), *shape), generators(seed, Draw.SAMPLE, indices))


def class_of(index: int, counts: Sequence[int]) -> int:
    """The class of image `index`, where the training set has `counts` images of each.

    The fractions of multiples of the golden ratio fill [0, 1) evenly; a class has a part of it as long as its share of
    the training set. So any run of images has nearly its mix of classes, whatever the number of images.
    """
    point = index * GOLDEN % 1 * sum(counts)
    return int(np.searchsorted(np.cumsum(counts), point, side="right"))


class Sampler:
    """Makes images of a trained model, on `device`.

    Args:
        guidance: of a model with classes: 1 samples them as they were learned; more exaggerates what sets them apart
            (classifier-free guidance) at twice the cost; 0 ignores them.
        half: bfloat16 weights; the solver stays in float32.
        compile: compile both networks, on CUDA into graphs; costs a minute, and batches should be of one size.
    """

    def __init__(
        self,
        model: TrainedModel,
        solver: Solver,
        steps: int,
        guidance: float,
        half: bool,
        compile: bool,
        device: torch.device,
    ) -> None:
        layout = torch.channels_last
        self.dtype = torch.bfloat16 if half else torch.float32
        self.device = device
        self.steps = steps
        self.guidance = guidance
        self.classes = len(model.classes)
        self._unet, self._vae = (
            # Not by `to`: of a dtype there diffusers warns even where nothing is to be kept in float32.
            part.type(self.dtype).to(device, memory_format=layout)
            for part in (model.unet, model.vae)
        )
        self._schedule = _schedule(solver, model.schedule)
        self._graphs = compile and device.type == "cuda"
        if compile:
            mode = "reduce-overhead" if self._graphs else "default"
            self._unet.compile(mode=mode, dynamic=False)
            self._vae.decoder.compile(mode=mode, dynamic=False)

    @torch.inference_mode()
    def images(self, noise: Tensor, labels: Sequence[int] | None = None) -> np.ndarray:
        """uint8 [B,S,S] of starting noise [B,C,h,w]; `labels` are the images' classes where the model has classes."""
        z = noise.to(self.device, memory_format=torch.channels_last)
        classes = torch.tensor(labels, device=self.device) if labels is not None else None
        self._schedule.set_timesteps(self.steps)
        # The solver looks its coefficients up on the CPU; the network has its steps on the device. Neither waits.
        for t, on_device in zip(self._schedule.timesteps, self._schedule.timesteps.to(self.device), strict=True):
            z = self._schedule.step(self._noise(z, on_device, classes), t, z).prev_sample
        decoded = self._vae.decode((z / self._vae.config.scaling_factor).to(self.dtype)).sample
        grey = (decoded[:, 0].float() / 2 + 0.5).clamp(0, 1) * 255
        return grey.round().to(torch.uint8).cpu().numpy()

    def _noise(self, z: Tensor, t: Tensor, classes: Tensor | None) -> Tensor:
        """ε_θ(z, t), float32 [B,C,h,w]."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        z = z.to(self.dtype)
        if classes is None:
            return self._unet(z, t).sample.float()
        any_class = torch.full_like(classes, self.classes)
        if self.guidance in (0, 1):
            return self._unet(z, t, classes if self.guidance else any_class).sample.float()
        both = self._unet(torch.cat([z, z]), t, torch.cat([classes, any_class])).sample.float()
        of_class, of_any = both.chunk(2)
        return of_any + self.guidance * (of_class - of_any)


def _schedule(solver: Solver, trained: DDIMScheduler) -> DDIMScheduler | DPMSolverMultistepScheduler:
    if solver == "ddim":
        return DDIMScheduler.from_config(trained.config)
    return DPMSolverMultistepScheduler.from_config(trained.config, algorithm_type="dpmsolver++", solver_order=2)
