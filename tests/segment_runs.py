"""Helpers of the tests of `mgcc segment`: data and configs of tiny runs."""

import numpy as np

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.data.records import write_index, write_shard
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.splits import make_split, write_split
from mgcc_dist.methods.segment_config import SegmentConfig

UNET = ["--network.name", "unet", "--loop.epochs", "null", "--loop.steps", "1", "--loop.learning_rate", "1e-12"]


def write_data(folder, phantom_shards):
    """Options for 24 phantom images, 16 of them for training, 8 of these labeled; and 5 synthetic images."""
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
    return parse(SegmentConfig, argv, CONFIGS / "segment", "mgcc_demo")


def steps(count, out, *words):
    return [
        *UNET,
        "--loop.learning_rate",
        "0.1",
        "--loop.schedule",
        "constant",
        *words,
        "--loop.steps",
        count,
        "--out",
        out,
    ]
