"""The segmentation program: which images a setting uses, what a run leaves, what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from mgcc_dist.config import CONFIGS, parse
from mgcc_dist.data.records import Sample, ShardFolder, write_index, write_shard
from mgcc_dist.data.splits import make_split, read_split, write_split
from mgcc_dist.errors import UserError
from mgcc_dist.methods.trained import load_predictor
from mgcc_dist.segment import SegmentationTask, SegmentConfig, run


@pytest.fixture(scope="module")
def data(tmp_path_factory, phantom_shards):
    """Options for 24 phantom images, 16 of them for training, 8 of these labeled; and 5 synthetic images."""
    folder = tmp_path_factory.mktemp("segment")
    split = make_split(phantom_shards.records, seed=0, validation=8, labeled=8, grouped=False, name="s_1")
    write_split(folder / "split.json", split)
    grey = np.full((32, 32), 90, np.uint8)
    synthetic = [Sample(f"synthetic-{i}", grey, None, {"dataset": "synthetic", "class": "synthetic"}) for i in range(5)]
    (folder / "synthetic").mkdir()
    write_index(folder / "synthetic", "synthetic", [write_shard(folder / "synthetic" / "s.tar", synthetic)])
    words = f"--data.shards {phantom_shards.folder} --data.split {folder / 'split.json'} --data.image_size 32"
    return words.split(), folder / "synthetic"


def configured(data, *words, preset="mgcc_demo"):
    options, _ = data
    tiny = ["--network.widths", "[4,8]", "--data.workers", "0", "--data.synthetic", "null"]
    argv = ["--preset", preset, *options, *tiny, *map(str, words)]
    return parse(SegmentConfig, "segment", "", CONFIGS / "segment", "mgcc_demo", argv)


def counts_of(config):
    data = ShardFolder.open(Path(config.data.shards))
    return SegmentationTask(config, data, read_split(Path(config.data.split)), Accelerator(cpu=True)).counts


def test_each_setting_of_the_paper_uses_its_images(data):
    synthetic = ["--data.synthetic", data[1]]
    assert counts_of(configured(data)) == {"labeled": 8, "unlabeled": 8, "validation": 8}  # Table I
    assert counts_of(configured(data, *synthetic)) == {"labeled": 8, "unlabeled": 13, "validation": 8}  # Table III
    everything = configured(data, *synthetic, "--data.labels", "all")  # Table IV
    assert counts_of(everything) == {"labeled": 16, "unlabeled": 5, "validation": 8}
    supervised = configured(data, "--data.labels", "all", preset="unet_demo")  # Table I, U-Net
    assert counts_of(supervised) == {"labeled": 16, "unlabeled": 0, "validation": 8}


def test_unlabeled_batches_without_unlabeled_images_are_refused(data):
    with pytest.raises(UserError, match=r"data\.batch_unlabeled is not 0 but there are no unlabeled images"):
        counts_of(configured(data, "--data.labels", "all"))


def test_a_run_leaves_a_result_and_networks_that_load(data, tmp_path, capsys):
    steps = ["--loop.epochs", "null", "--loop.steps", "3", "--out", tmp_path]
    config = configured(data, *steps)
    run(config)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["method"], result["dataset"], result["split"], result["steps"]) == ("mgcc", "phantom", "s_1", 3)
    assert len(result["best"]["images"]) == result["best"]["summary"]["images"] == 8
    assert {"key", "class", "paper", "corrected", "lesion", "hd95", "asd"} <= result["last"]["images"][0].keys()
    network, size = load_predictor(tmp_path, "last")
    assert size == 32
    assert sum(parameter.numel() for parameter in network.parameters()) == result["parameters"]["inference"]
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 1, 32, 32)
    for weights in ("best", "last"):
        assert np.ptp(np.asarray(Image.open(tmp_path / weights / "gallery.png"))) > 0
    capsys.readouterr()
    run(config)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds a run with loop\.seed = 0, not 1"):
        run(configured(data, *steps, "--loop.seed", "1"))
