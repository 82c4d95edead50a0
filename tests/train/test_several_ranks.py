"""Runs on two real ranks: resuming on another number of ranks, a loss that is not finite, a full disk."""

import json
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from toy import CONFIG, Toy, ToyTask, run

from mgcc_dist.common.errors import EXIT_STOPPED
from mgcc_dist.train.metrics_logger import read_rows

TOY = Path(__file__).with_name("toy.py")

pytestmark = pytest.mark.multiprocess


def on_two_ranks(folder, **options):
    done = ranks.run(ranks.forked(2), [TOY, folder, json.dumps(options)])
    assert "world size 2" in done.stderr, done.stderr
    return done


def errors(done):
    """Error lines of the ranks, without those of the launcher."""
    assert 'toy.py", line' not in done.stderr, "a rank's stack trace"
    return [line for line in done.stderr.splitlines() if re.match(r"toy( \[rank \d\])?: ", line)]


def assert_same_run(folder, expected):
    """Assert the same rows and weights, up to the order in which gradients are added."""
    rows, others = (read_rows(one / "metrics.jsonl") for one in (folder, expected))
    for row, other in zip(rows, others, strict=True):
        assert (row["step"], row["epoch"], row["split"]) == (other["step"], other["epoch"], other["split"])
        value = "loss" if row["split"] == "train" else "error"
        assert row[value] == pytest.approx(other[value], rel=1e-5)
    for kind in ("best", "last"):
        weights, others = (load_file(one / kind / "model.safetensors")["weight"] for one in (folder, expected))
        torch.testing.assert_close(weights, others, rtol=1e-5, atol=1e-7)


def steps_of_checkpoints(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def assert_rank_1_waited_for_data(folder, log):
    """Half a second in one of two steps."""
    found = [row["stragglers"]["slowest"] for row in read_rows(folder / "metrics.jsonl") if "stragglers" in row]
    waits = [{each["rank"]: each["data_seconds"] for each in slowest}[1] for slowest in found]
    slowest = found[waits.index(max(waits))]
    assert max(waits) > 0.2
    assert sorted(each["rank"] for each in slowest) == [0, 1]
    assert all(each["seconds"] >= each["data_seconds"] and each["host"] == socket.gethostname() for each in slowest)
    assert re.search(r"toy: slowest ranks: rank \d \(.+\) needs .* s per step for data \(.* s\) and forward pass", log)


def test_a_run_that_resumes_on_other_ranks_sees_the_same_images_and_losses(tmp_path):
    """2 ranks to step 5, one to step 8, 2 to the end, switching between rows and epochs; compared with one rank."""
    folder, one_rank = tmp_path / "changing", tmp_path / "one_rank"
    steps = {"epochs": 4.66, "warmup_epochs": 1}  # 14 steps, 3 of them warmup, also where a rank accumulates
    expected, _ = run(one_rank, replace(CONFIG, accumulation=2, **steps))

    assert on_two_ranks(folder, stop_at=5, seen=str(tmp_path), **steps).returncode != 0
    single = ToyTask(stop_at=8)
    with pytest.raises(SystemExit) as stopped:
        run(folder, replace(CONFIG, **steps), single)
    assert stopped.value.code == EXIT_STOPPED
    done = on_two_ranks(folder, seen=str(tmp_path), slow=0.5, **steps)
    assert done.returncode == 0, done.stderr
    assert_rank_1_waited_for_data(folder, done.stderr)

    seen_by_rank = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted(map(len, seen_by_rank)) == [10, 10, 12, 12]  # two images a step: 5 steps, then 6
    seen = [tuple(image) for images in [*seen_by_rank, single.module.seen] for image in images]
    assert sorted(seen) == sorted(expected.module.seen)
    assert_same_run(folder, one_rank)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_with_one_error(tmp_path):
    folder, steps = tmp_path / "run", {"steps": 12, "epochs": None}
    done = on_two_ranks(folder, nan_at=7, nan_on=1, seen=str(tmp_path), **steps)
    assert done.returncode != 0
    assert errors(done) == [
        "toy: toy: the loss is not finite at step 8 (loss nan). Earlier checkpoints are kept. "
        "Try a lower loop.learning_rate, loop.clip_norm 1, or loop.precision no."
    ]
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["0-8.json", "1-8.json"]
    assert steps_of_checkpoints(folder) == [3, 6]

    run(folder, replace(CONFIG, **steps))
    run(tmp_path / "one_rank", replace(CONFIG, accumulation=2, **steps))
    assert_same_run(folder, tmp_path / "one_rank")


def test_a_disk_that_fills_up_during_a_checkpoint_keeps_the_previous_one(tmp_path, small_disk):
    folder, steps, size = small_disk.folder / "run", {"steps": 12, "epochs": None}, 60_000
    small_disk.resize("2m")  # a checkpoint has weights, momentum and average of 240 kB each
    done = on_two_ranks(folder, size=size, **steps)
    assert done.returncode != 0
    [line] = errors(done)
    assert re.search(r"can't be written .* bytes are free in .*Earlier checkpoints are kept. Free some space", line)
    kept = steps_of_checkpoints(folder)
    assert kept, "no scratch folder takes the space"
    assert kept[0] in (3, 6)

    small_disk.resize("8m")
    task, _ = run(folder, replace(CONFIG, **steps), ToyTask(Toy(size)))
    assert task.steps_seen[0] == kept[-1]
    run(tmp_path / "one_rank", replace(CONFIG, accumulation=2, **steps), ToyTask(Toy(size)))
    assert_same_run(folder, tmp_path / "one_rank")


def test_a_rank_that_hangs_is_named_and_ends_the_run(tmp_path):
    """Rank 1 takes six seconds for a batch, the others wait for three."""
    done = on_two_ranks(tmp_path, slow=6, timeout_minutes=0.05)
    assert done.returncode == 1
    log = done.stderr
    assert re.search(
        r"\[rank 0\] WARNING no progress: rank 1 \(process \d+ on .*\) has been in step \d, waiting for a batch for "
        r"0:00:0\d\. The run ends after loop\.timeout_minutes \(0\.05\)\.",
        log,
    ), log
    assert re.search(r"\[rank 0\] ERROR rank 1 \(process \d+ on .*\) has been in step \d, waiting for a batch", log), (
        log
    )
    assert "another rank did not answer in time (the log names it). Rerun the same command to resume." in log
    run(tmp_path, replace(CONFIG, accumulation=2))


def test_a_rank_that_dies_is_named_and_ends_the_run(tmp_path):
    done = on_two_ranks(tmp_path, killed_at=4)
    assert done.returncode != 0
    assert re.search(r"\[rank 0\] ERROR rank 1 \(process \d+ on .*\) has ended, last seen in step \d", done.stderr)
    assert [line for line in errors(done) if "another rank has ended" in line], done.stderr
