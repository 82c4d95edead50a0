"""Every method under two real ranks: DDP, and DeepSpeed's ZeRO-2."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from ranks import finish, torchrun
from safetensors.torch import load_file

from mgcc_dist.data.splits import make_split, write_split

PAIRS = [
    *("supervised:unet", "mean_teacher:unet", "uamt:unet", "dct:unet", "cps:unet", "ctbct:unet"),
    *("cct:cct", "mgcc:mgcc", "cutmix_teacher:mgcc"),
]
ZERO_2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.fixture(scope="module")
def data(tmp_path_factory, phantom_shards):
    split = tmp_path_factory.mktemp("ranks") / "split.json"
    write_split(split, make_split(phantom_shards.records, seed=0, validation=4, labeled=8, grouped=False, name="r_1"))
    return phantom_shards.folder, split


def train(data, out, environment):
    """Two steps of every method on two ranks; the rows of metrics.jsonl by method."""
    program = Path(__file__).with_name("segment_on_ranks.py")
    printed = finish(torchrun(2), [program, *data, out, *PAIRS], **environment)
    assert printed.count("world size 2") == len(PAIRS)
    losses = {}
    for pair in PAIRS:
        folder = out / pair.replace(":", "-")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[pair] = [row["loss"] for row in rows if row["split"] == "train"]
        assert len(losses[pair]) == 2, pair
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "last" / "model.safetensors").values())
    return losses


@pytest.fixture(scope="module")
def under_ddp(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp")
    return out, train(data, out, {})


@pytest.mark.multiprocess
def test_every_method_trains_under_ddp(under_ddp):
    assert under_ddp[1].keys() == set(PAIRS)


@pytest.mark.multiprocess
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_every_method_trains_under_zero_2_to_the_weights_of_ddp(data, under_ddp, tmp_path):
    folder, losses = under_ddp
    for pair, values in train(data, tmp_path, ZERO_2).items():
        assert values == pytest.approx(losses[pair], rel=1e-4), pair
        weights, expected = (
            load_file(out / pair.replace(":", "-") / "last" / "model.safetensors") for out in (tmp_path, folder)
        )
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{pair} {name}")
