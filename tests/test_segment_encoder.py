"""`mgcc segment` with a pretrained encoder: what a run keeps of it, and which encoder is the same one."""

import json
import shutil
import socket

import numpy as np
import pytest
from backbones import WIDTHS, save_backbone
from safetensors.torch import load_file

import mgcc_dist as mgcc
from mgcc_dist.assessment import features
from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.inference.loading import load_predictor, run_info
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.reporting.runs import find_runs, group_runs
from mgcc_dist.segment import run


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was used"))


def configured(data, encoder, out, *words):
    paths = ["--data.shards", data / "shards", "--data.split", data / "split.json", "--data.synthetic", "null"]
    sizes = ["--data.image_size", 32, "--network.widths", json.dumps(WIDTHS), "--data.workers", 0, "--loop.steps", 1]
    argv = ["--preset", "mgcc_demo", *paths, *sizes, "--network.encoder", encoder, "--out", out, *words]
    return parse(SegmentConfig, list(map(str, argv)), CONFIGS / "segment", "mgcc_demo")


@pytest.fixture(scope="module")
def trained(phantom_data, tmp_path_factory):
    """A run of one step, its config, and its encoder's folder, which has been moved since."""
    root = tmp_path_factory.mktemp("encoder")
    save_backbone(root / "there")
    config = configured(phantom_data, root / "there", root / "run")
    run(config)
    (root / "there").rename(root / "moved")
    return root / "run", config, root / "moved"


def test_the_result_names_the_encoder_and_the_report_tells_encoders_apart(trained, phantom_data, tmp_path):
    folder, _, moved = trained
    sha256 = sha256_of(moved / "model.safetensors")
    result = json.loads((folder / "result.json").read_text())
    assert result["encoder"]["sha256"] == sha256 == result["inputs"][result["encoder"]["weights"]]
    assert result["init"] is None

    save_backbone(tmp_path / "other", seed=1)
    run(configured(phantom_data, tmp_path / "other", tmp_path / "run"))
    groups = group_runs(find_runs([folder, tmp_path / "run"]).segmentation)
    assert groups[0].network == f"mgcc 2-3-4-5-6-8 (encoder {sha256[:8]})"
    assert len({group.network for group in groups}) == 2


def test_training_starts_from_the_encoder_and_changes_it(trained):
    name = "embedder.embedder.convolution.weight"
    before = load_file(trained[2] / "model.safetensors")[f"resnet.{name}"]
    after = load_file(trained[0] / "last" / "model.safetensors")[f"encoder.backbone.model.{name}"]
    assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()


def test_a_run_is_used_without_the_folder_of_its_encoder(trained, phantom_data, tmp_path):
    folder, config, _ = trained
    network, size = load_predictor(folder)
    assert size == 32
    assert network.encoder.backbone is not None
    prediction = mgcc.load(folder).predict(np.zeros((40, 50), np.uint8))
    assert prediction.mask.shape == (40, 50)
    assert features.load(str(folder), vae=None, image_size=32).network.encoder is not None
    assert "encoder_config" not in run_info(folder / "best" / "model.safetensors")["network"]
    run(configured(phantom_data, config.network.encoder, tmp_path, "--init", folder))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["init"]["sha256"] == sha256_of(folder / "best" / "model.safetensors")
    assert load_predictor(tmp_path)[0].encoder.architecture == network.encoder.architecture


def test_the_same_encoder_under_another_path_is_the_same_run(trained, phantom_data, tmp_path, caplog):
    folder, config, moved = trained
    with caplog.at_level("INFO"):
        run(config)
        assert "nothing to do" in caplog.text
        caplog.clear()
        run(configured(phantom_data, moved, folder))
        assert "nothing to do" in caplog.text
    shutil.copytree(moved, tmp_path / "changed")
    save_backbone(tmp_path / "changed", seed=1)
    with pytest.raises(UserError, match=r"holds a run with network\.encoder = .*there, not .*changed"):
        run(configured(phantom_data, tmp_path / "changed", folder))


def test_an_unfinished_run_is_not_resumed_after_its_encoder_changed(phantom_data, tmp_path):
    save_backbone(tmp_path / "encoder")
    config = configured(phantom_data, tmp_path / "encoder", tmp_path / "run")
    run(config)
    (tmp_path / "run" / "result.json").unlink()
    run(config)
    (tmp_path / "run" / "result.json").unlink()
    save_backbone(tmp_path / "encoder", seed=1)
    with pytest.raises(UserError, match=r"encoder/model\.safetensors: changed since the run in .* started"):
        run(config)


def test_an_image_size_that_the_encoder_cannot_divide_is_refused_before_it_is_read(phantom_data, tmp_path):
    with pytest.raises(UserError, match=r"data\.image_size: 48 is not a multiple of 32, which method mgcc with"):
        configured(phantom_data, tmp_path / "nowhere", tmp_path / "run", "--data.image_size", 48)


def test_zero_3_is_refused_before_the_encoder_is_read(phantom_data, tmp_path, monkeypatch):
    monkeypatch.setattr("mgcc_dist.segmentation.task.zero_stage", lambda accelerator: 3)
    with pytest.raises(UserError, match=r"network\.encoder: a pretrained encoder can't be trained with ZeRO-3\. Use"):
        run(configured(phantom_data, tmp_path / "nowhere", tmp_path / "run"))
