"""Methods under two real ranks: all of them with DDP and one ZeRO stage, some with FSDP2."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from ranks import REPOSITORY, forked, run
from safetensors.torch import load_file

from mgcc_dist.data.splits import make_split, write_split

PAIRS = [
    *("supervised:unet", "mean_teacher:unet", "uamt:unet", "dct:unet", "cps:unet", "ctbct:unet"),
    *("fixmatch:unet", "unimatch:unet", "bcp:unet"),
    *("cct:cct", "mgcc:mgcc", "cutmix_teacher:mgcc"),
]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
UNDER_ZERO_3 = [
    *("mean_teacher:unet", "uamt:unet", "bcp:unet", "cutmix_teacher:mgcc"),
    *("unimatch:unet", "dct:unet", "cps:unet", "mgcc:mgcc"),
]
UNDER_ZERO_2 = [pair for pair in PAIRS if pair not in UNDER_ZERO_3[4:]]
UNDER_FSDP = ["mean_teacher:unet", "unimatch:unet", "mgcc:mgcc"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, phantom_shards):
    split = tmp_path_factory.mktemp("ranks") / "split.json"
    write_split(split, make_split(phantom_shards.records, seed=0, validation=4, labeled=8, grouped=False, name="r_1"))
    return phantom_shards.folder, split


def train(data, out, pairs=PAIRS, **environment):
    """Two steps of every method on two ranks: the losses by method, and the lines that name those refused."""
    program = Path(__file__).with_name("segment_on_ranks.py")
    done = run(forked(2), [program, *data, out, *pairs], **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("world size 2") == len(pairs)
    refused = [line for line in done.stdout.splitlines() if " refused: " in line]
    losses = {}
    for pair in pairs:
        if any(line.startswith(pair) for line in refused):
            continue
        folder = out / pair.replace(":", "-")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[pair] = [row["loss"] for row in rows if row["split"] == "train"]
        assert len(losses[pair]) == 2, pair
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "last" / "model.safetensors").values())
    return losses, refused


def assert_same_weights(pairs, out, expected):
    for folder in (pair.replace(":", "-") for pair in pairs):
        weights, others = (load_file(one / folder / "last" / "model.safetensors") for one in (out, expected))
        for name, tensor in others.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{folder} {name}")


@pytest.fixture(scope="module")
def under_ddp(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp")
    return out, train(data, out)


@pytest.mark.multiprocess
def test_every_method_trains_under_ddp(under_ddp):
    losses, refused = under_ddp[1]
    assert losses.keys() == set(PAIRS)
    assert refused == []


@pytest.mark.multiprocess
@needs_deepspeed
def test_the_methods_that_zero_3_does_not_train_below_train_under_zero_2(data, under_ddp, tmp_path):
    expected, (losses, _) = under_ddp
    zero_2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    found, _ = train(data, tmp_path, UNDER_ZERO_2, **zero_2)
    assert found == {pair: pytest.approx(losses[pair], rel=1e-4) for pair in UNDER_ZERO_2}
    assert_same_weights(UNDER_ZERO_2, tmp_path, expected)


@pytest.mark.multiprocess
def test_fsdp2_trains_to_the_weights_of_ddp(data, under_ddp, tmp_path):
    """With a teacher, with `encode` and with `outputs` instead of `forward`. It takes only contiguous weights."""
    expected, (losses, _) = under_ddp
    variables = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    variables |= {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "1000"}
    found, _ = train(data, tmp_path, UNDER_FSDP, **variables)
    assert found == {pair: pytest.approx(losses[pair], rel=1e-4) for pair in UNDER_FSDP}
    assert_same_weights(UNDER_FSDP, tmp_path, expected)


@pytest.mark.multiprocess
@needs_deepspeed
def test_zero_3_trains_to_the_weights_of_ddp_and_refuses_methods_with_a_teacher(data, under_ddp, tmp_path):
    """Of small tensors ZeRO-3 would leave each rank the whole; here it divides all."""
    settings = json.loads((REPOSITORY / "launch" / "deepspeed" / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    settings["bf16"]["enabled"] = False
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero3.json")}

    expected, (losses, _) = under_ddp
    found, refused = train(data, tmp_path, UNDER_ZERO_3, **environment)
    teachers = [pair for pair in UNDER_ZERO_3 if pair not in found]
    assert teachers == ["mean_teacher:unet", "uamt:unet", "bcp:unet", "cutmix_teacher:mgcc"]
    for pair, line in zip(teachers, refused, strict=True):
        assert line.startswith(f"{pair} refused: method.name: {pair.split(':')[0]} averages the weights of a teacher")
        assert "ZeRO-2" in line
    assert found == {pair: pytest.approx(losses[pair], rel=1e-4) for pair in found}
    assert_same_weights(found, tmp_path, expected)
