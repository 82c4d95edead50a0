"""Stages of `mgcc ldm` as runs."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_ldm import AUTOENCODER, DENOISER, LOOP
from torch import nn

from mgcc_dist.assessment.ldm_config import LdmConfig
from mgcc_dist.assessment.ldm_stages import list_stages
from mgcc_dist.common.distributed import create_accelerator
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.common.stages import resolve
from mgcc_dist.data.phantom import draw
from mgcc_dist.data.records import write_index, write_shard
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.splits import make_split, read_split, write_split
from mgcc_dist.diffusion.config import DataConfig, ReconstructionConfig
from mgcc_dist.diffusion.stages import encode_images, open_images, train_autoencoder, train_denoiser
from mgcc_dist.inference.encoders import load_feature_maps
from mgcc_dist.train.config import LoopConfig
from mgcc_dist.train.saved_run import read_result
from tests.data.http_folder import serving


@pytest.mark.parametrize("labeled", [0, 3])
def test_two_steps_are_trained_on_images_without_masks(tmp_path, labeled):
    """All or some of 12 images have no mask; the split that `mgcc ldm` makes then looks at no masks."""
    samples = [draw(3, i, 16) for i in range(12)]
    records = [
        Sample(f"{i:02}", sample.image, sample.mask if i < labeled else None, {}) for i, sample in enumerate(samples)
    ]
    (tmp_path / "shards").mkdir()
    write_index(tmp_path / "shards", "mine", [write_shard(tmp_path / "shards" / "0.tar", records)])
    data = DataConfig(shards=str(tmp_path / "shards"), image_size=16, workers=0)
    accelerator = create_accelerator()
    images = open_images(data, tmp_path / "out", accelerator)
    split = read_split(tmp_path / "out" / "split.json")
    assert (len(split.labeled), len(split.unlabeled), len(split.validation)) == (0, 8, 4)
    two_steps = replace(LOOP, steps=2)
    first, second = replace(AUTOENCODER, batch=2, loop=two_steps), replace(DENOISER, batch=2, loop=two_steps)
    train_autoencoder(first, data, images, tmp_path / "out", accelerator)
    encoded = encode_images(first, images, tmp_path / "out", accelerator)
    train_denoiser(second, data, images, encoded, tmp_path / "out", accelerator)
    result = read_result(tmp_path / "out" / "denoiser")
    assert (result["steps"], result["images"]) == (2, {"train": 8, "val": 4})


def test_data_at_a_url_counts_by_its_content(tmp_path, phantom_shards):
    """So that finished stages follow data that move, and notice data that change at their URL."""

    def inputs(shards):
        config = LdmConfig(DataConfig(shards=str(shards), image_size=16), AUTOENCODER, DENOISER, out=str(tmp_path))
        return resolve(list_stages(config, lambda: pytest.fail("opened"), create_accelerator())[0].inputs)

    with serving(phantom_shards.folder) as server:
        assert inputs(f"{server.url}?signature=abc") == inputs(phantom_shards.folder)


def test_finished_stage_whose_split_changed_is_refused(tmp_path, phantom_shards):
    """Without this, the denoiser trains on images that the autoencoder was validated on."""
    path = tmp_path / "split.json"
    split = make_split(phantom_shards.records, seed=0, validation=8, labeled=8, grouped=False, name="s_1")
    write_split(path, split)
    data = DataConfig(shards=str(phantom_shards.folder), split=str(path), image_size=16, workers=0)
    config = replace(AUTOENCODER, batch=4)
    accelerator = create_accelerator()
    train_autoencoder(config, data, open_images(data, tmp_path, accelerator), tmp_path, accelerator)
    weights = (tmp_path / "autoencoder" / "vae" / "diffusion_pytorch_model.safetensors").stat()
    train_autoencoder(config, data, open_images(data, tmp_path, accelerator), tmp_path, accelerator)  # nothing to do
    assert (tmp_path / "autoencoder" / "vae" / "diffusion_pytorch_model.safetensors").stat() == weights
    write_split(path, replace(split, labeled=split.validation, validation=split.labeled))
    with pytest.raises(UserError, match=r"split\.json: changed since the run in .*/autoencoder started"):
        train_autoencoder(config, data, open_images(data, tmp_path, accelerator), tmp_path, accelerator)


def test_stages_are_extended_and_start_from_weights(tmp_path, phantom_shards):
    """The autoencoder only as long as no denoiser depends on it."""
    data = DataConfig(shards=str(phantom_shards.folder), image_size=16, workers=0)
    accelerator = create_accelerator()
    images = open_images(data, tmp_path, accelerator)
    short, long = (LoopConfig(steps=steps, learning_rate=1e-3, schedule="constant") for steps in (1, 2))
    autoencoder, denoiser = (replace(config, batch=4, loop=short) for config in (AUTOENCODER, DENOISER))

    def steps(stage):
        return json.loads((tmp_path / stage / "result.json").read_text())["steps"]

    train_autoencoder(autoencoder, data, images, tmp_path, accelerator)
    train_autoencoder(replace(autoencoder, loop=long), data, images, tmp_path, accelerator)
    assert steps("autoencoder") == 2
    encoded = encode_images(autoencoder, images, tmp_path, accelerator)
    train_denoiser(denoiser, data, images, encoded, tmp_path, accelerator)
    train_denoiser(replace(denoiser, loop=long), data, images, encoded, tmp_path, accelerator)
    assert steps("denoiser") == 2
    with pytest.raises(
        UserError,
        match=r"can't be extended to 3, because .*/latents was encoded with it\. .* pass --autoencoder\.init .*/last\.",
    ):
        train_autoencoder(replace(autoencoder, loop=replace(long, steps=3)), data, images, tmp_path, accelerator)

    other, still = tmp_path / "other", replace(short, learning_rate=1e-12)
    for stage, config in (("autoencoder", autoencoder), ("denoiser", denoiser)):
        config = replace(config, loop=still, init=str(tmp_path / stage))
        if stage == "autoencoder":
            train_autoencoder(config, data, images, other, accelerator)
        else:
            train_denoiser(config, data, images, encoded, other, accelerator)
        source = tmp_path / stage / "last" / "model.safetensors"
        assert json.loads((other / stage / "result.json").read_text())["init"] == {
            "weights": str(source),
            "sha256": sha256_of(source),
        }
        found, expected = (load_file(folder / stage / "last" / "model.safetensors") for folder in (other, tmp_path))
        assert all(torch.allclose(found[name], expected[name]) for name in expected)
    wider = replace(autoencoder, channels=(4, 8, 8), init=str(tmp_path / "autoencoder"))
    with pytest.raises(UserError, match=r"does not match the configured architecture\. "):
        train_autoencoder(wider, data, images, tmp_path / "third", accelerator)


def test_a_feature_network_that_changed_since_the_run_started_is_refused(tmp_path, phantom_shards):
    path = tmp_path / "network.pt"
    torch.jit.script(nn.Conv2d(1, 2, 3)).save(path)
    data = DataConfig(shards=str(phantom_shards.folder), image_size=16, workers=0)
    losses = ReconstructionConfig(features=0.1, network=str(path))
    loop = replace(LOOP, steps=1, schedule="constant")
    accelerator = create_accelerator()
    images = open_images(data, tmp_path, accelerator)

    def train(steps):
        config = replace(AUTOENCODER, batch=4, losses=losses, loop=replace(loop, steps=steps))
        train_autoencoder(config, data, images, tmp_path, accelerator, load_feature_maps)
        return read_result(tmp_path / "autoencoder")

    result = train(1)
    assert result["inputs"][str(path)] == sha256_of(path)
    assert result["init"] is None
    torch.jit.script(nn.Conv2d(1, 2, 3)).save(path)
    with pytest.raises(UserError, match=r"network\.pt: changed since the run in .*/autoencoder started"):
        train(2)
