"""Objectives: forward process, target, weights, and the solvers that sample from them."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from tiny_ldm import DENOISER
from torch import nn

from mgcc_dist.common.errors import UserError
from mgcc_dist.diffusion.config import check_objective
from mgcc_dist.diffusion.objective import build_objective, build_solver, pipeline_scheduler

Z0, NOISE = torch.randn(2, 4, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0, 10, 500, 999])
V = replace(DENOISER, objective="v_prediction")
ZERO_SNR = replace(V, zero_terminal_snr=True)
FLOW = replace(DENOISER, objective="flow")


def alpha_bar(config=DENOISER):
    """ᾱ_t at the steps T, [4,1,1,1]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    if config.zero_terminal_snr:  # Lin et al. 2024, Algorithm 1
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return (root**2)[T].view(-1, 1, 1, 1)


@pytest.mark.parametrize("config", [V, ZERO_SNR])
def test_velocity_and_noisy_latents_give_back_latents_and_noise(config):
    objective, a = build_objective(config), alpha_bar(config)
    z, v = objective.add_noise(Z0, NOISE, T), objective.target(Z0, NOISE, T)
    torch.testing.assert_close(z, a.sqrt() * Z0 + (1 - a).sqrt() * NOISE, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(a.sqrt() * z - (1 - a).sqrt() * v, Z0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((1 - a).sqrt() * z + a.sqrt() * v, NOISE, rtol=1e-4, atol=1e-4)


def test_with_zero_terminal_snr_nothing_is_left_of_the_image():
    objective, last = build_objective(ZERO_SNR), T[-1:]
    assert torch.equal(objective.add_noise(Z0[:1], NOISE[:1], last), NOISE[:1])
    assert torch.equal(objective.target(Z0[:1], NOISE[:1], last), -Z0[:1])
    assert pipeline_scheduler(ZERO_SNR).alphas_cumprod[-1] == 0
    assert pipeline_scheduler(V).alphas_cumprod[-1] > 0.004


def test_flow_is_a_straight_line_with_constant_velocity():
    objective = build_objective(FLOW)
    sigma = (objective.timestep(T) / 1000).view(-1, 1, 1, 1)
    assert sigma.flatten().tolist() == pytest.approx([0.001, 0.011, 0.501, 1])
    z, velocity = objective.add_noise(Z0, NOISE, T), objective.target(Z0, NOISE, T)
    torch.testing.assert_close(z, Z0 + sigma * velocity)
    torch.testing.assert_close(z[-1], NOISE[-1])
    assert set(T[1:].tolist()) <= set((build_solver("euler", pipeline_scheduler(FLOW)).timesteps - 1).int().tolist())


@pytest.mark.parametrize("gamma", [1.0, 5.0, 1e9])
def test_min_snr_weights_errors_of_the_latent_by_the_limited_ratio(gamma):
    """Hang et al. 2023: ||z₀ - ẑ₀||² has the weight min(SNR, γ), whatever the denoiser predicts."""
    a = alpha_bar()
    snr = (a / (1 - a)).flatten()
    error_of_latent = snr.clamp(max=gamma)
    # An error d of ε is an error √(1-ᾱ)/√ᾱ d of z₀, an error d of v one of √(1-ᾱ) d.
    noise = build_objective(replace(DENOISER, min_snr_gamma=gamma)).weight(T).double()
    torch.testing.assert_close(noise, error_of_latent / snr, rtol=1e-3, atol=0)
    velocity = build_objective(replace(V, min_snr_gamma=gamma)).weight(T).double()
    torch.testing.assert_close(velocity, error_of_latent * (1 - a).flatten(), rtol=1e-3, atol=0)
    assert build_objective(DENOISER).weight(T) is None


@pytest.mark.parametrize(
    ("config", "solver"),
    [(ZERO_SNR, "ddim"), (ZERO_SNR, "dpm_solver++"), (FLOW, "euler"), (FLOW, "dpm_solver++"), (V, "ddim")],
)
def test_perfect_predictions_lead_from_noise_to_the_latent(config, solver):
    scheduler = build_solver(solver, pipeline_scheduler(config))
    scheduler.set_timesteps(10)
    z, target = NOISE.float(), Z0.float()
    for index, t in enumerate(scheduler.timesteps):
        if config is FLOW:
            prediction = (z - target) / scheduler.sigmas[index]
        else:
            a = pipeline_scheduler(config).alphas_cumprod[t]
            prediction = (a.sqrt() * z - target) / (1 - a).sqrt()
        z = scheduler.step(prediction, t, z).prev_sample
    torch.testing.assert_close(z, target, rtol=1e-3, atol=2e-3)


class PointDenoiser(nn.Module):
    """For latents [B,1,1,1]; the time scales and shifts the latents."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 128))
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, z, t):
        scale, shift = self.time(get_timestep_embedding(t.expand(len(z)) / 20, 16)).chunk(2, dim=1)
        return self.out(scale * z[:, 0, 0] + shift)[..., None, None]


@pytest.mark.parametrize(
    ("config", "solver"),
    [(replace(DENOISER, min_snr_gamma=5.0), "dpm_solver++"), (ZERO_SNR, "ddim"), (FLOW, "euler")],
)
def test_a_denoiser_learns_a_data_set_of_two_points(config, solver):
    torch.manual_seed(0)
    objective, denoiser, steps = build_objective(config), PointDenoiser(), 150
    optimizer = torch.optim.Adam(denoiser.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        latents = torch.randint(2, (256, 1, 1, 1)) * 2.0 - 1
        noise, t = torch.randn_like(latents), torch.randint(1000, (256,))
        predicted = denoiser(objective.add_noise(latents, noise, t), objective.timestep(t))
        errors = (predicted - objective.target(latents, noise, t)).flatten() ** 2
        weight = objective.weight(t)
        optimizer.zero_grad()
        (errors if weight is None else errors * weight).mean().backward()
        optimizer.step()
    scheduler = build_solver(solver, pipeline_scheduler(config))
    scheduler.set_timesteps(20)
    z = torch.randn(500, 1, 1, 1)
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(denoiser(z, t), t, z).prev_sample
    assert ((z.abs() - 1).abs() < 0.25).float().mean() > 0.8
    assert 0.4 < (z > 0).float().mean() < 0.6


@pytest.mark.parametrize(
    ("change", "solver", "message"),
    [
        ({"zero_terminal_snr": True}, "ddim", r"denoiser\.zero_terminal_snr: can't be combined with objective epsilon"),
        ({"zero_terminal_snr": True, "objective": "flow"}, "euler", "has no effect on a flow.* Set it to false"),
        ({"min_snr_gamma": 5.0, "objective": "flow"}, "euler", r"denoiser\.min_snr_gamma: is not defined for a flow"),
        (
            {"min_snr_gamma": 5.0, "objective": "v_prediction", "zero_terminal_snr": True},
            "ddim",
            "gives pure noise, where zero_terminal_snr ends, the weight 0",
        ),
        ({"objective": "flow"}, "ddim", r"sampling\.sampler: ddim can't sample a flow\. Choose euler or dpm_solver"),
        ({"objective": "v_prediction"}, "euler", "euler only samples denoisers with objective flow"),
    ],
)
def test_options_that_exclude_each_other_are_refused(change, solver, message):
    with pytest.raises(ValueError, match=message):
        check_objective(replace(DENOISER, **change), solver)


def test_a_trained_model_is_sampled_by_solvers_for_it_only():
    with pytest.raises(UserError, match="sample: ddim can't sample a flow"):
        build_solver("ddim", pipeline_scheduler(FLOW))
    with pytest.raises(UserError, match="sample: euler only samples"):
        build_solver("euler", pipeline_scheduler(V))
