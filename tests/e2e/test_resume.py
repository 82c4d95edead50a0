"""A killed run that is resumed ends in the same losses and weights, bit for bit: two real ranks, CPU, fp32."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import ranks
import toy_ldm
from same_run import assert_same_run

from mgcc_dist.common.errors import EXIT_STOPPED
from mgcc_dist.train.metrics_logger import read_rows


def start(words: list[str], count: int) -> subprocess.Popen:
    """Start a program of the package on `count` ranks."""
    return ranks.start(ranks.torchrun(count), ["-m", *words])


def finish(words: list[str], count: int) -> str:
    """Run it to its end and return its log."""
    return ranks.finish_log(ranks.torchrun(count), ["-m", *words])


def wait_for_step(process: subprocess.Popen, metrics: Path, step: int) -> None:
    """Wait until `metrics` has a row of `step` or later."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = read_rows(metrics)
        if rows and rows[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError(f"{metrics} did not reach step {step}")


def kill(launcher: subprocess.Popen, number: signal.Signals) -> None:
    """Send the signal to the launcher; SIGKILL also to its ranks, because the launcher can't forward it."""
    started = psutil.Process(launcher.pid).children(recursive=True)
    for process in [launcher, *(started if number == signal.SIGKILL else [])]:
        process.send_signal(number)
    launcher.communicate(timeout=60)
    psutil.wait_procs(started, timeout=60)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    """40 phantom images of 32x32, and a split file."""
    folder = tmp_path_factory.mktemp("data")
    shards = ["mgcc_dist.shards", "phantom", "--count", "40", "--size", "32", "--out", str(folder / "shards")]
    finish(shards, 1)
    split = ["--root", str(folder / "shards"), "--out", str(folder / "split.json")]
    finish(["mgcc_dist.shards", "split", *split, "--validation", "0.25", "--labeled", "0.5", "--seed", "0"], 1)
    return folder


def segment(phantom: Path, out: Path) -> list[str]:
    """MGCC at a toy size: 15 labeled + 15 unlabeled images, 12 steps of two ranks x (2 + 2)."""
    return (
        f"mgcc_dist.segment --preset mgcc_demo --data.shards {phantom}/shards --data.split {phantom}/split.json "
        "--data.synthetic null --data.image_size 32 --data.augment ultrasound --data.workers 1 "
        "--data.batch_labeled 2 --data.batch_unlabeled 2 --network.widths [4,8,8,8,16] "
        "--loop.epochs null --loop.steps 12 --loop.log_every 2 "
        f"--loop.checkpoint_every 3 --loop.ema_decay 0.9 --out {out}"
    ).split()


@pytest.fixture(scope="module")
def full_segmentation(phantom) -> Path:
    """An uninterrupted run."""
    assert "world size 2" in finish(segment(phantom, phantom / "full"), 2)
    return phantom / "full"


@pytest.mark.multiprocess
@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_segmentation_killed_at_a_random_step_resumes_bit_exactly(tmp_path, phantom, full_segmentation, number):
    expected, run = full_segmentation, tmp_path / "killed"
    process = start(segment(phantom, run), 2)
    wait_for_step(process, run / "metrics.jsonl", random.Random(number).choice([2, 4, 6, 8]))
    kill(process, number)
    assert not (run / "result.json").exists()

    assert "from step" in finish(segment(phantom, run), 2)
    assert_same_run(run, expected)
    assert result_of(run) == result_of(expected)


@pytest.mark.multiprocess
@pytest.mark.e2e
@pytest.mark.parametrize(("number", "stage"), [(signal.SIGTERM, "autoencoder"), (signal.SIGKILL, "denoiser")])
def test_generation_killed_at_a_random_step_resumes_bit_exactly(tmp_path, full_ldm, number, stage):
    config, expected = full_ldm
    out = tmp_path / "killed"
    command = ["mgcc_dist.ldm", "--config", str(config), "--out", str(out)]
    process = start(command, 2)
    wait_for_step(process, out / stage / "metrics.jsonl", random.Random(number).choice([2, 4, 6, 8]))
    kill(process, number)
    assert not (out / stage / "result.json").exists()

    assert "from step" in finish(command, 2)
    for trained in ("autoencoder", "denoiser"):
        assert_same_run(out / trained, expected / trained)
    for shard in (expected / "samples").glob("*.tar"):
        assert (out / "samples" / shard.name).read_bytes() == shard.read_bytes(), shard.name


@pytest.fixture(scope="module")
def full_ldm(tmp_path_factory) -> tuple[Path, Path]:
    """A config of the generative program, and the folder of an uninterrupted run of it."""
    folder = tmp_path_factory.mktemp("ldm")
    config = folder / "ldm.yaml"
    config.write_text(toy_ldm.config(steps=14, checkpoint_every=3))
    finish(["mgcc_dist.ldm", "--config", str(config), "--out", str(folder / "full")], 2)
    return config, folder / "full"


def result_of(run: Path) -> dict:
    result = json.loads((run / "result.json").read_text())
    assert sum(map(len, result["environment"]["nodes"].values())) == result["world_size"]
    del result["seconds"], result["environment"]
    return result


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGINT])
def test_a_signal_saves_and_exits_with_its_own_code(tmp_path, phantom, number):
    process = start(segment(phantom, tmp_path), 1)
    wait_for_step(process, tmp_path / "metrics.jsonl", 2)
    os.kill(process.pid, number)
    _, log = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, log
    assert "stopped by a signal at step" in log
