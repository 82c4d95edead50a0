"""DeepSpeed's ZeRO as launch/ starts it: two real ranks, compared with one rank without it."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
import toy_ldm
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.ldm import LdmConfig
from mgcc_dist.ldm import run as run_here
from mgcc_dist.train.config import AdamWConfig, LoopConfig
from mgcc_dist.train.loop import _configure_deepspeed

LAUNCH = ranks.REPOSITORY / "launch"

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

NO_ASSESSMENT = ["--audit.enabled", "false", "--quality.enabled", "false"]


def run(launcher: list[str], out: Path, *words: str) -> subprocess.CompletedProcess:
    config = out.parent / "toy.yaml"
    config.write_text(toy_ldm.config(steps=4, checkpoint_every=100, samples=2))
    return ranks.run(launcher, ["-m", "mgcc_dist.ldm", "--config", config, "--out", out, *NO_ASSESSMENT, *words])


def zero(stage: int, folder: Path, count: int = 2) -> list[str]:
    """The shipped files on `count` ranks, without ZeRO-3's exception for small tensors: here all tensors are small."""
    settings = json.loads((LAUNCH / "deepspeed" / f"zero{stage}.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(settings))
    shipped = str(LAUNCH / "accelerate" / f"8gpu_zero{stage}.yaml")
    return ranks.accelerate(
        "--config_file", shipped, "--num_processes", str(count), "--deepspeed_config_file", str(path)
    )


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """The denoiser of one rank without ZeRO that accumulates the batches of two."""
    out = tmp_path_factory.mktemp("one") / "ldm"
    accumulate = ["--autoencoder.loop.accumulation", "2", "--denoiser.loop.accumulation", "2"]
    done = run([], out, *accumulate)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "denoiser"


@pytest.fixture(scope="module")
def two_ranks(request, tmp_path_factory):
    """A ZeRO stage, the folder of a run with it, and the run's log."""
    stage, out = request.param, tmp_path_factory.mktemp("zero") / "ldm"
    done = run(zero(stage, out.parent), out)
    assert done.returncode == 0, done.stderr[-3000:]
    return stage, out, done.stderr


@pytest.mark.parametrize("two_ranks", [1, 2, 3], indirect=True)
def test_zero_on_two_ranks_exports_the_average_of_one_rank(two_ranks, one_rank):
    stage, out, log = two_ranks
    assert "world size 2 (DEEPSPEED), device cpu, precision no" in log
    assert f'"zero_stage": {stage}' in (next((out / "denoiser").glob("checkpoints/*/state.json"))).read_text()
    for kind in ("best", "last"):
        averages, expected = (load_file(f / kind / "model.safetensors") for f in (out / "denoiser", one_rank))
        assert averages.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(averages[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{kind} {name}")
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (out / "denoiser", one_rank))
    assert ours["parameters"] == theirs["parameters"]
    assert ours["best"]["loss"] == pytest.approx(theirs["best"]["loss"], rel=1e-3)


@pytest.mark.parametrize("two_ranks", [1], indirect=True)
def test_zero_resumes_only_on_its_own_number_of_ranks(two_ranks):
    """Nor without ZeRO. The error is one line, and no file changes."""
    _, out, _ = two_ranks
    (out / "denoiser" / "result.json").unlink()  # as if it had been stopped after its last checkpoint
    before = {path: path.read_bytes() for path in (out / "denoiser" / "checkpoints").rglob("*") if path.is_file()}
    done = run(zero(1, out.parent, count=1), out)
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("ldm")]
    assert line.endswith(
        "was saved with ZeRO-1 on 2 ranks and can't be loaded with ZeRO-1 on 1. "
        "Resume it on 2 ranks with the same launch file."
    )
    with pytest.raises(UserError, match=r"ZeRO-1 on 2 ranks and can't be loaded with no ZeRO on 1"):
        run_here(
            parse(
                LdmConfig,
                ["--config", str(out.parent / "toy.yaml"), "--out", str(out), *NO_ASSESSMENT],
                CONFIGS / "ldm",
                "demo",
            )
        )
    assert before == {path: path.read_bytes() for path in before}


def test_sgd_with_offload_is_refused():
    """Accelerate would silently train with Adam instead."""
    settings = json.loads((LAUNCH / "deepspeed" / "zero3_offload.json").read_text())
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3, deepspeed_config=settings))
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state, num_processes=2)
    task = SimpleNamespace(name="segment", loader=SimpleNamespace(batch_labeled=4, batch_unlabeled=4))
    with pytest.raises(
        UserError, match=r"loop\.optimizer is sgd, but .* adam or adamw, or a launch file without offload"
    ):
        _configure_deepspeed(task, LoopConfig(steps=1), accelerator)
    _configure_deepspeed(task, LoopConfig(steps=1, optimizer=AdamWConfig()), accelerator)
    assert settings["train_batch_size"] == 16
