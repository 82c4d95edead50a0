"""A killed run that is resumed ends in the same losses and weights, bit for bit: two real ranks, CPU, fp32."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import ranks
import toy_ldm
from same_run import assert_same_run

from mgcc_dist.common.errors import EXIT_STOPPED
from mgcc_dist.train.metrics_logger import read_rows


def finish(words: list[str]) -> str:
    """Run a program of the package on two ranks to its end and return its log."""
    return ranks.finish_log(ranks.forked(2), ["-m", *words])


def wait_for_step(process: ranks.Started, metrics: Path, step: int) -> None:
    """Wait until `metrics` has a row of `step` or later."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = read_rows(metrics)
        if rows and rows[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError(f"{metrics} did not reach step {step}")


def kill(started: ranks.Started, number: signal.Signals) -> None:
    """Send the signal to the launcher, or to each forked rank, and wait for the end of all ranks."""
    started.send_signal(number)
    started.communicate(timeout=60)


def segment(phantom_data: Path, out: Path) -> list[str]:
    """MGCC at a toy size: 15 labeled + 15 unlabeled images, 12 steps of two ranks x (2 + 2)."""
    return (
        f"mgcc_dist.segment --preset mgcc_demo --data.shards {phantom_data}/shards "
        f"--data.split {phantom_data}/split.json --data.synthetic null --data.image_size 32 "
        "--data.augment ultrasound --data.workers 1 --data.batch_labeled 2 --data.batch_unlabeled 2 "
        "--network.widths [4,8,8,8,16] --loop.epochs null --loop.steps 12 --loop.log_every 2 "
        f"--loop.checkpoint_every 3 --loop.ema_decay 0.9 --out {out}"
    ).split()


def generate(config: Path, out: Path) -> list[str]:
    return ["mgcc_dist.ldm", "--config", str(config), "--out", str(out), "--until", "samples"]


@pytest.fixture(scope="module")
def full_segmentation(phantom_data, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("segment") / "full"
    assert "world size 2" in finish(segment(phantom_data, out))
    return out


@pytest.mark.multiprocess
@pytest.mark.e2e
@pytest.mark.parametrize(
    ("launcher", "number"), [(ranks.torchrun(2), signal.SIGTERM), (ranks.forked(2), signal.SIGKILL)]
)
def test_segmentation_killed_at_a_random_step_resumes_bit_exactly(
    tmp_path, phantom_data, full_segmentation, launcher, number
):
    expected, run = full_segmentation, tmp_path / "killed"
    process = ranks.start(launcher, ["-m", *segment(phantom_data, run)])
    wait_for_step(process, run / "metrics.jsonl", random.Random(number).choice([2, 4, 6, 8]))
    kill(process, number)
    assert not (run / "result.json").exists()

    assert "from step" in finish(segment(phantom_data, run))
    assert_same_run(run, expected)
    assert result_of(run) == result_of(expected)


@pytest.mark.multiprocess
@pytest.mark.e2e
@pytest.mark.parametrize(("number", "stage"), [(signal.SIGTERM, "autoencoder"), (signal.SIGKILL, "denoiser")])
def test_generation_killed_at_a_random_step_resumes_bit_exactly(tmp_path, full_ldm, number, stage):
    config, expected = full_ldm
    out = tmp_path / "killed"
    command = generate(config, out)
    process = ranks.start(ranks.forked(2), ["-m", *command])
    wait_for_step(process, out / stage / "metrics.jsonl", random.Random(number).choice([2, 4, 6, 8]))
    kill(process, number)
    assert not (out / stage / "result.json").exists()

    assert "from step" in finish(command)
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
    finish(generate(config, folder / "full"))
    return config, folder / "full"


def result_of(run: Path) -> dict:
    result = json.loads((run / "result.json").read_text())
    assert sum(map(len, result["environment"]["nodes"].values())) == result["world_size"]
    del result["seconds"], result["environment"]
    return result


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGINT])
def test_a_signal_saves_and_exits_with_its_own_code(tmp_path, phantom_data, number):
    process = ranks.start(ranks.forked(1), ["-m", *segment(phantom_data, tmp_path)])
    wait_for_step(process, tmp_path / "metrics.jsonl", 2)
    process.send_signal(number)
    _, log = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, log
    assert "stopped by a signal at step" in log
