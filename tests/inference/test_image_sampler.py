"""Sampling from a trained diffusion model through the Python API."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_ldm import DENOISER, SHAPE

import mgcc_dist as mgcc
from mgcc_dist.diffusion import denoiser, pipeline

CLASSES = {"benign": 3, "malignant": 1}


def save_pipeline(vae, folder, classes):
    torch.manual_seed(1)
    config = replace(DENOISER, classes=bool(classes))
    pipeline.save(vae, denoiser.build(config, SHAPE, len(classes)), config, classes, {}, folder)


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_samples_are_pil_images_that_depend_only_on_seed_and_index(vae, tmp_path):
    save_pipeline(vae, tmp_path / "pipeline", {})
    sampler = mgcc.load_pipeline(tmp_path, device="cpu")  # the output folder of ldm
    images = sampler.sample(5, seed=3, steps=2)
    assert all(isinstance(image, Image.Image) and (image.mode, image.size) == ("L", (16, 16)) for image in images)
    again = mgcc.load_pipeline(tmp_path / "pipeline", device="cpu").sample(3, seed=3, steps=2, batch=2)
    assert abs(pixels(images[:3]) - pixels(again)).max() <= 1  # another batch size rounds differently
    assert abs(pixels(images) - pixels(sampler.sample(5, seed=4, steps=2))).max() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1001}, "steps must be at most 1000, .* got 1001"),
        ({"guidance": 2}, "guidance 2 needs a model with cl"),
        ({"guidance": float("nan")}, "guidance must be a number from 0, got nan"),
        ({"solver": "dpm"}, r"solver must be one of ddim, dpm_solver\+\+, euler, got 'dpm'"),
        ({"seed": -1}, "seed must be an integer from 0, got -1"),
        ({"steps": 2.5}, r"steps must be a positive integer, got 2\.5"),
    ],
)
def test_settings_that_the_model_cannot_follow_are_refused(vae, tmp_path, options, message):
    save_pipeline(vae, tmp_path, {})
    with pytest.raises(mgcc.UserError, match=message):
        mgcc.load_pipeline(tmp_path, device="cpu").sample(1, **options)


def test_a_class_can_be_chosen_and_unknown_ones_are_refused(vae, tmp_path):
    save_pipeline(vae, tmp_path, CLASSES)
    sampler = mgcc.load_pipeline(tmp_path, device="cpu")
    assert sampler.classes == ["benign", "malignant"]
    assert len(sampler.sample(2, class_name="malignant", steps=1)) == 2
    with pytest.raises(mgcc.UserError, match=r"no class 'cyst'\. Its classes: benign, malignant"):
        sampler.sample(1, class_name="cyst")


def test_wrong_arguments_and_folders_are_named(vae, tmp_path):
    save_pipeline(vae, tmp_path, {})
    sampler = mgcc.load_pipeline(tmp_path, device="cpu")
    for name in ("count", "steps", "batch"):
        with pytest.raises(mgcc.UserError, match=f"{name} must be a positive integer, got 0"):
            sampler.sample(**{"count": 1, name: 0})
    with pytest.raises(mgcc.UserError, match="trained without classes"):
        sampler.sample(1, class_name="benign")
    with pytest.raises(mgcc.UserError, match="nowhere"):
        mgcc.load_pipeline(tmp_path / "nowhere")
