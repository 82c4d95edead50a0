"""The diffusion transformer: like the U-Net, it is conditioned, trained, saved, and sampled by plain diffusers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from tiny_ldm import LOOP, PROGRESS, SHAPE, latents_of

from mgcc_dist.diffusion import denoiser, pipeline
from mgcc_dist.diffusion.condition import Condition
from mgcc_dist.diffusion.config import DiTDenoiserConfig
from mgcc_dist.diffusion.denoiser import DenoiserLoss, predict
from mgcc_dist.diffusion.noise import RngStream, make_generators
from mgcc_dist.diffusion.objective import build_objective
from mgcc_dist.diffusion.sampler import Sampler, initial_noise

DIT = DiTDenoiserConfig(loop=LOOP, layers=2, heads=2, head_channels=4)
CPU = torch.device("cpu")
Z, T = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor(5)
LABELS = torch.tensor([0, 1])


def built(config, classes=3):
    """A DiT with random weights; a new one predicts 0."""
    torch.manual_seed(0)
    dit = denoiser.build(config, SHAPE, classes)
    for weight in dit.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return dit


def test_a_new_transformer_is_initialized_as_in_the_paper():
    dit = denoiser.build(DIT, SHAPE, 3)
    assert not predict(dit, Z, T, Condition()).any()
    z = torch.randn(3, 4, 8)
    assert torch.equal(dit.transformer_blocks[0](z, timestep=T.expand(3), class_labels=torch.zeros(3).long()), z)
    assert dit.pos_embed.proj.weight.abs().max() < (6 / (8 + 8)) ** 0.5  # 2 x 2 x 2 inputs, 8 outputs


@pytest.mark.parametrize("classes", [False, True])
def test_all_weights_get_gradients_and_labels_are_dropped_by_the_image_only(classes):
    """diffusers' model drops labels in each block from the global random state. DDP refuses unused weights."""
    config = replace(DIT, classes=classes)
    module = DenoiserLoss(built(config), build_objective(config), 3 if classes else None, 0.5)
    batch = latents_of(torch.randn(8, 4, 4, 4), list(range(8)))
    before = torch.get_rng_state()
    losses = [module(batch, PROGRESS)["loss"] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(losses[0], losses[1])
    losses[0].backward()
    assert all(weight.grad is not None for weight in module.parameters())


def test_prediction_depends_on_class_and_mask():
    dit = built(replace(DIT, classes=True, masks="all"))
    masks = torch.stack([torch.full((1, 4, 4), value) for value in (-1.0, 1.0)])
    with torch.no_grad():
        known = predict(dit, Z, T, Condition(LABELS, masks))
        others = [
            predict(dit, Z, T, Condition(1 - LABELS, masks)),
            predict(dit, Z, T, Condition(LABELS, -masks)),
            predict(dit, Z, T, Condition(LABELS, masks).null(3)),
        ]
    assert known.shape == Z.shape
    assert all(not torch.equal(known, other) for other in others)


@pytest.mark.parametrize(
    ("change", "solver"),
    [({}, "ddim"), ({"classes": True}, "ddim"), ({"classes": True, "objective": "flow"}, "dpm_solver++")],
)
def test_stock_diffusers_generates_the_same_images_from_the_same_noise(vae, tmp_path, change, solver):
    config = replace(DIT, **change)
    counts = {"benign": 5, "malignant": 2} if config.classes else {}
    pipeline.save(vae, built(config, len(counts)), config, counts, {}, tmp_path / "p")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert isinstance(stock, DiTPipeline)
    assert stock.labels == {name: label for label, name in enumerate(counts)}
    labels = [1, 0] if counts else [0, 0]
    generators = make_generators(3, RngStream.SAMPLE, [4, 5])
    pictures = stock(labels, guidance_scale=1, generator=generators, num_inference_steps=5, output_type="np").images

    sampler = Sampler(pipeline.load(tmp_path / "p"), solver, 5, 1.0, False, False, CPU)
    condition = Condition(torch.tensor(labels)) if counts else Condition()
    ours = sampler.generate(initial_noise(3, [4, 5], SHAPE), condition)
    assert np.abs(pictures[..., 0] * 255 - ours).max() <= 0.51
    assert np.ptp(ours) > 0
    assert pipeline.vae_folder(tmp_path / "p") == tmp_path / "p" / "vae"


def test_guidance_extrapolates_from_the_null_class(vae, tmp_path):
    config = replace(DIT, classes=True)
    dit = built(config, 2).eval()
    pipeline.save(vae, dit, config, {"a": 1, "b": 1}, {}, tmp_path / "p")
    with torch.no_grad():
        conditional, unconditional = (
            dit(Z, T.expand(2), class_labels=labels).sample for labels in (LABELS, torch.tensor([2, 2]))
        )
        guided = Sampler(pipeline.load(tmp_path / "p"), "ddim", 2, 3.0, False, False, CPU)._predict(
            Z, T, Condition(LABELS)
        )
    assert not torch.equal(conditional, unconditional)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-5)


def test_width_must_suit_the_position_embedding():
    with pytest.raises(
        ValueError, match=r"denoiser\.head_channels: 3 times denoiser\.heads \(2\) must be a multiple of 4"
    ):
        replace(DIT, head_channels=3)
