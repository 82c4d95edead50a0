"""`mgcc segment` on splits with a test part, and on partly labeled data sets."""

import json
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from mgcc_dist import shards
from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.splits import make_split, read_split, write_split
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.segment import run
from mgcc_dist.segmentation.task import SegmentationTask


def configured(shard_folder, split, *words):
    tiny = "--network.widths [4,8] --data.workers 0 --data.synthetic null --data.image_size 32"
    data = [
        "--data.shards",
        str(shard_folder),
        "--data.split",
        str(split),
        "--loop.epochs",
        "null",
        "--loop.steps",
        "1",
    ]
    return parse(SegmentConfig, [*data, *tiny.split(), *map(str, words)], CONFIGS / "segment", "mgcc_demo")


def result_of(config):
    run(config)
    return json.loads((Path(config.out) / "result.json").read_text())


def test_test_part_is_scored_once_with_the_best_weights_and_nothing_else(tmp_path, phantom_shards):
    test = tuple(phantom_shards.keys()[:6])
    split = make_split(phantom_shards.records, 0, validation=4, labeled=6, grouped=True, name="t_1", test=test)
    write_split(tmp_path / "t_1.json", split)
    result = result_of(configured(phantom_shards.folder, tmp_path / "t_1.json", "--out", tmp_path / "run"))
    assert {image["key"] for image in result["best"]["test"]["images"]} == set(test)
    assert {image["key"] for image in result["best"]["images"]} == set(split.validation)
    assert "test" not in result["last"]
    assert result["images"] == {"labeled": 6, "unlabeled": 8, "training": 8, "validation": 4, "test": 6}


def test_few_labeled_and_many_unlabeled_images_of_one_folder(image_folder, tmp_path):
    """The case of docs/start/own-data.md: 6 images with a mask, 5 of them for training, and 10 without."""
    for i in range(10):
        noise = np.random.default_rng(i).integers(0, 256, (30, 40), dtype=np.uint8)
        Image.fromarray(noise).save(image_folder / "images" / f"more_{i}.png")
    out, split = tmp_path / "shards", tmp_path / "s.json"
    shards.main(["folder", "--root", str(image_folder), "--out", str(out), "--size", "32"])
    shards.main(["split", "--root", str(out), "--out", str(split), "--labeled", "1", "--validation", "0.17"])
    expected = {"labeled": 5, "unlabeled": 10, "training": 10, "validation": 1}
    assert result_of(configured(out, split, "--out", tmp_path / "run"))["images"] == expected
    all_labels = configured(out, split, "--data.labels", "all")
    task = SegmentationTask(all_labels, ShardFolder.open(out), read_split(split), Accelerator(cpu=True))
    assert task.counts == expected
