"""Stages of `mgcc ldm` as runs."""

from dataclasses import replace

import pytest
from tiny_ldm import AUTOENCODER

from mgcc_dist.common.distributed import create_accelerator
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.splits import make_split, write_split
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.stages import open_images, train_autoencoder


def test_finished_stage_whose_split_changed_is_refused(tmp_path, phantom_shards):
    """Without this, the denoiser trains on images that the autoencoder was validated on."""
    path = tmp_path / "split.json"
    split = make_split(phantom_shards.records, seed=0, validation=8, labeled=8, grouped=False, name="s_1")
    write_split(path, split)
    data = DataConfig(shards=str(phantom_shards.folder), split=str(path), image_size=16, workers=0)
    config = replace(AUTOENCODER, batch=4)
    accelerator = create_accelerator()
    train_autoencoder(config, data, open_images(data, tmp_path, accelerator), tmp_path)
    weights = (tmp_path / "autoencoder" / "vae" / "diffusion_pytorch_model.safetensors").stat()
    train_autoencoder(config, data, open_images(data, tmp_path, accelerator), tmp_path)  # nothing to do
    assert (tmp_path / "autoencoder" / "vae" / "diffusion_pytorch_model.safetensors").stat() == weights
    write_split(path, replace(split, labeled=split.validation, validation=split.labeled))
    with pytest.raises(UserError, match=r"split\.json: changed since the run in .*/autoencoder started"):
        train_autoencoder(config, data, open_images(data, tmp_path, accelerator), tmp_path)
