"""Configs and weights that version 0.1.0 wrote are read in the form of this version.

tests/ctbct_of_0_1 is what it wrote for: segment --preset mgcc_demo --method.name ctbct --network.name unet
--network.widths [2,4] --network.in_channels 1 --network.embed_dim 4 --network.depths [1,1] --network.heads [1,2]
--network.window 2 --loop.momentum 0.8 ...
"""

import pytest
import torch
import yaml

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS, as_plain, load, save
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.migration import current
from mgcc_dist.inference.loading import load_predictor, run_info
from mgcc_dist.ldm import LdmConfig
from mgcc_dist.methods.config import CrossTeachingConfig
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.models.config import SwinUNetConfig, UNetConfig
from mgcc_dist.train.config import AdamConfig, SGDConfig
from tests.conftest import REPOSITORY

SAVED = REPOSITORY / "tests" / "ctbct_of_0_1"


def test_a_saved_config_keeps_the_keys_of_its_components():
    config = load(SegmentConfig, SAVED / "config.yaml")
    assert config.network == UNetConfig(in_channels=1, widths=(2, 4))
    swin = SwinUNetConfig(in_channels=1, embed_dim=4, depths=(1, 1), heads=(1, 2), window=2)
    assert config.method == CrossTeachingConfig(ramp="compressed", swin_unet=swin)
    assert config.loop.optimizer == SGDConfig(momentum=0.8)


def test_a_saved_config_is_a_config_file():
    words = ["--config", str(SAVED / "config.yaml"), "--loop.seed", "7"]
    assert parse(SegmentConfig, words, CONFIGS / "segment", "mgcc_demo").method.name == "ctbct"


def test_weights_are_loaded_and_described():
    network, size = load_predictor(SAVED)
    assert size == 32
    assert network(torch.zeros(1, 1, 32, 32)).isfinite().all()
    assert run_info(SAVED / "best" / "model.safetensors")["network"] == {
        "name": "unet",
        "in_channels": 1,
        "widths": [2, 4],
    }


def test_optimizers_of_all_stages_become_sections(tmp_path):
    old = yaml.safe_load((CONFIGS / "ldm" / "demo.yaml").read_text())
    for stage in ("autoencoder", "denoiser"):
        old[stage]["loop"] |= {"optimizer": "adam", "momentum": 0.9, "weight_decay": 0.5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    config = load(LdmConfig, tmp_path / "config.yaml")
    assert config.autoencoder.loop.optimizer == config.denoiser.loop.optimizer == AdamConfig(weight_decay=0.5)


def test_a_preset_of_0_1_with_an_optimizers_keys_is_read(tmp_path):
    (tmp_path / "mine.yaml").write_text("loop: {optimizer: sgd, momentum: 0.5, weight_decay: 0.1, epochs: 1}")
    words = ["--data.shards", "a", "--data.split", "b", "--config", str(tmp_path / "mine.yaml")]
    assert parse(SegmentConfig, words).loop.optimizer == SGDConfig(weight_decay=0.1, momentum=0.5)


def test_keys_of_other_components_in_a_preset_are_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("network: {name: unet, widths: [8, 16], taps: [3]}")
    with pytest.raises(UserError, match=r"mine\.yaml: network\.taps: network unet has no such key\. Its keys: name"):
        parse(SegmentConfig, ["--config", str(tmp_path / "mine.yaml")])


def test_saved_configs_hold_the_schema_version(tmp_path):
    config = load(SegmentConfig, SAVED / "config.yaml")
    save(config, tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["schema_version"] == 2
    assert saved["network"] == as_plain(UNetConfig(in_channels=1, widths=(2, 4)))
    assert load(SegmentConfig, tmp_path / "config.yaml") == config
    with pytest.raises(UserError, match=r"there: schema_version is 3, and this version reads 2\. Update mgcc-dist"):
        current(saved | {"schema_version": 3}, "there")
