"""What a denoiser learns to predict: noise, velocity or flow. And the schedulers of diffusers that sample from it.

Diffusion takes a latent z₀ to z_t = √ᾱ_t z₀ + √(1-ᾱ_t) ε in T steps. The denoiser predicts from z_t

- `epsilon`: the noise ε (Ho et al. 2020; the paper's Eq. 2),
- `v_prediction`: v = √ᾱ_t ε - √(1-ᾱ_t) z₀ (Salimans & Ho 2022), which is still defined where z_t is pure noise.

With `zero_terminal_snr` ᾱ_T is 0, as sampling assumes when it starts from pure noise (Lin et al. 2024).

`flow` is a rectified flow (Liu et al. 2023; Lipman et al. 2023): z_t = (1-σ) z₀ + σ ε on a straight line, and the
denoiser predicts its velocity ε - z₀.

With `min_snr_gamma` γ the squared error of z₀ is weighted by min(SNR_t, γ), where SNR_t = ᾱ_t / (1-ᾱ_t) (Hang et al.
2023). Without it the error of ε counts equally at all t, that is, the error of z₀ by SNR_t.
"""

from pathlib import Path
from typing import Protocol

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.training_utils import compute_snr
from torch import Tensor

from mgcc_dist.common.errors import UserError
from mgcc_dist.diffusion.config import DenoiserConfig, Solver, solver_problem

FLOW = "flow_prediction"
"""`prediction_type` of a scheduler of diffusers that samples from a rectified flow"""


class Objective(Protocol):
    """Forward process, prediction target and weights; t are indices of the T steps, int64 [B]."""

    steps: int

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return z_t [B,C,h,w]."""

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the denoiser should predict from z_t, [B,C,h,w]."""

    def timestep(self, t: Tensor) -> Tensor:
        """Return the time that the denoiser gets, [B]."""

    def weight(self, t: Tensor) -> Tensor | None:
        """Return the weights of the squared errors, [B]; None if all are 1."""


class Diffusion:
    """The objectives `epsilon` and `v_prediction`."""

    def __init__(self, config: DenoiserConfig) -> None:
        self.steps = config.diffusion_steps
        self._gamma = config.min_snr_gamma
        self._predicts_noise = config.objective == "epsilon"
        self._scheduler = _diffusion_scheduler(config)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self._scheduler.add_noise(latents, noise, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise if self._predicts_noise else self._scheduler.get_velocity(latents, noise, t)

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def weight(self, t: Tensor) -> Tensor | None:
        if self._gamma is None:
            return None
        snr = compute_snr(self._scheduler, t)
        return snr.clamp(max=self._gamma) / (snr if self._predicts_noise else snr + 1)


class RectifiedFlow:
    """The objective `flow`, with σ = 1/T, 2/T, ..., 1 and times σT, as FlowMatchEulerDiscreteScheduler has them."""

    def __init__(self, config: DenoiserConfig) -> None:
        self.steps = config.diffusion_steps

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = (self.timestep(t) / self.steps).to(latents)[:, None, None, None]
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - latents

    def timestep(self, t: Tensor) -> Tensor:
        return t + 1

    def weight(self, t: Tensor) -> Tensor | None:
        return None


def build_objective(config: DenoiserConfig) -> Objective:
    """Return the objective that `config` names."""
    return RectifiedFlow(config) if config.objective == "flow" else Diffusion(config)


def pipeline_scheduler(config: DenoiserConfig) -> SchedulerMixin:
    """Return the scheduler that is saved with a pipeline, with which pipelines of diffusers can sample.

    It is DDIM. For a flow it is DPM-Solver++, because pipelines of diffusers for unconditional models cannot call
    FlowMatchEulerDiscreteScheduler.
    """
    if config.objective == "flow":
        return DPMSolverMultistepScheduler(
            num_train_timesteps=config.diffusion_steps, prediction_type=FLOW, use_flow_sigmas=True
        )
    return DDIMScheduler.from_config(_diffusion_scheduler(config).config)


def load_scheduler(folder: Path) -> SchedulerMixin:
    """Load the scheduler of a pipeline."""
    config = DDIMScheduler.load_config(folder)
    kind = DPMSolverMultistepScheduler if config.get("prediction_type") == FLOW else DDIMScheduler
    return kind.from_config(config)


def build_solver(solver: Solver, trained: SchedulerMixin) -> SchedulerMixin:
    """Return the scheduler that samples with `solver`, given that of the pipeline.

    Raises:
        UserError: the solver cannot sample what the denoiser predicts.
    """
    is_flow = trained.config.prediction_type == FLOW
    if problem := solver_problem(solver, is_flow):
        raise UserError(f"sample: {problem}")
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=trained.config.num_train_timesteps)
    if solver == "ddim":
        return DDIMScheduler.from_config(trained.config)
    return DPMSolverMultistepScheduler.from_config(trained.config, algorithm_type="dpmsolver++", solver_order=2)


def _diffusion_scheduler(config: DenoiserConfig) -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=config.diffusion_steps,
        beta_schedule=config.schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        prediction_type=config.objective,
        rescale_betas_zero_snr=config.zero_terminal_snr,
        clip_sample=False,  # latents, unlike images, have no bounds
        timestep_spacing="trailing",  # sampling starts at t = T, where training saw (nearly) pure noise
    )
