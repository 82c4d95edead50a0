"""The same sweep on one machine, without Slurm."""

import subprocess
import sys

import pytest
from jobs import dispatch, last_step, until
from same_run import assert_same_run
from sweep_files import SUPERVISED, write_ready_sweep

from mgcc_dist.common.sweep_file import read_sweep

pytestmark = pytest.mark.e2e


def test_local_and_debug_carry_the_same_sweep_out(phantom_data, tmp_path):
    local, debug = (write_ready_sweep(tmp_path, phantom_data, name, steps=3, seeds=[1]) for name in ("local", "debug"))
    assert "3 of 3 tasks are done" in dispatch("submit", local, "--cluster", "local", "--parallel", "2")
    assert "3 of 3 tasks are done" in dispatch("submit", debug, "--cluster", "debug")
    for one, other in zip(read_sweep(local).runs, read_sweep(debug).runs, strict=True):
        assert_same_run(one.folder, other.folder)
    assert "3 tasks: 3 done" in dispatch("status", local)
    assert "nothing to submit" in dispatch("submit", local)


def test_a_failure_is_told_and_what_waits_for_it_is_left_out(phantom_data, tmp_path):
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
    said = dispatch("submit", sweep, "--cluster", "local", code=1)
    assert "prepare/phantom/split failed\n    shards: nowhere" in said
    assert "is left out: what it waits for failed" in said
    assert "0 of 3 tasks are done" in said


def test_cancel_stops_a_local_sweep_which_resume_takes_up_again(phantom_data, tmp_path):
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
        sofar = last_step(first)
        try:
            until(lambda sofar=sofar: last_step(first) >= sofar + 3)
            assert "is being submitted by another process" in dispatch("submit", sweep, code=2)
        finally:
            assert "1 tasks cancelled" in dispatch("cancel", sweep)
        said, _ = submitting.communicate(timeout=120)
        assert submitting.returncode == 130, said
        assert "goes on from the checkpoints" in said
        stopped = last_step(first)
        assert (first / "checkpoints" / f"step-{stopped:08d}").is_dir()
        assert not second.exists()
    assert f"from step {sofar} of 100000" in dispatch("logs", sweep, "phantom/u-net/seed_1")
