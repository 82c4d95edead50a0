"""A sweep on one machine, without Slurm."""

import subprocess
import sys

import pytest
from jobs import dispatch, last_step, until
from same_run import assert_same_run
from sweep_files import SUPERVISED, write_ready_sweep

from mgcc_dist.sweep.expansion import read_sweep

pytestmark = pytest.mark.e2e


def test_local_and_debug_give_the_same_runs(phantom_data, tmp_path):
    changes = {"steps": 3, "seeds": [1, 2], "rows": {"U-Net": SUPERVISED}, "reference": None}
    local, debug = (write_ready_sweep(tmp_path, phantom_data, name, **changes) for name in ("local", "debug"))
    assert "3 of 3 tasks are done" in dispatch("submit", local, "--cluster", "local", "--parallel", "2")
    assert "3 of 3 tasks are done" in dispatch("submit", debug, "--cluster", "debug")
    for first, second in zip(read_sweep(local).runs, read_sweep(debug).runs, strict=True):
        assert_same_run(first.folder, second.folder)
    assert "3 tasks: 3 done" in dispatch("status", local)
    assert "nothing to submit" in dispatch("submit", local)


def test_a_failure_is_reported_and_its_dependents_are_skipped(phantom_data, tmp_path):
    makes = str(tmp_path / "never")
    step = {"run": f"shards split --root nowhere --out {makes}", "makes": makes}
    sweep = write_ready_sweep(
        tmp_path,
        phantom_data,
        "local",
        seeds=[1],
        rows={"U-Net": SUPERVISED | {"data": SUPERVISED["data"] | {"split": makes}}},
        reference=None,
        datasets={"Phantom": {"prepare": {"split": step}}},
    )
    output = dispatch("submit", sweep, "--cluster", "local", code=1)
    assert "prepare/phantom/split failed\n    shards: nowhere" in output
    assert "skipped: a task that it depends on failed" in output
    assert "0 of 3 tasks are done" in output


def test_cancel_stops_a_local_sweep_and_resume_continues_it(phantom_data, tmp_path):
    changes = {"seeds": [1, 2], "rows": {"U-Net": SUPERVISED}, "reference": None}
    sweep = write_ready_sweep(tmp_path, phantom_data, "local", steps=100_000, **changes)
    first, second = (run.folder for run in read_sweep(sweep).runs)
    for command in (["submit", str(sweep), "--cluster", "local"], ["resume", str(sweep)]):
        submitting = subprocess.Popen(
            [sys.executable, "-m", "mgcc_dist.slurm", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        previous = last_step(first)
        try:
            until(lambda previous=previous: last_step(first) >= previous + 3)
            assert "being submitted by another process" in dispatch("submit", sweep, code=2)
        finally:
            assert "1 tasks cancelled" in dispatch("cancel", sweep)
        output, _ = submitting.communicate(timeout=120)
        assert submitting.returncode == 130, output
        assert "to resume from the checkpoints" in output
        stopped = last_step(first)
        assert (first / "checkpoints" / f"step-{stopped:08d}").is_dir()
        assert not second.exists()
    assert f"from step {previous} of 100000" in dispatch("logs", sweep, "phantom/u-net/seed_1")
