"""Ten kills of four kinds at random moments of a sweep; every run ends once, as if nothing had been."""

import functools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from jobs import dispatch, hurry, job_of, last_step, notify, over, queue, restarts, until, until_in_slurm
from same_run import assert_same_run
from sweep_files import SUPERVISED, write_ready_sweep

from mgcc_dist.common.sweep_file import read_sweep
from mgcc_dist.train.metrics_logger import read_rows

pytestmark = pytest.mark.slurm

STEPS = 100
LATEST = 60
"""after this step of a run nobody kills it, so that each kill finds it alive"""
KINDS = ["USR2"] * 3 + ["TERM"] * 3 + ["KILL"] * 3 + ["slurmd"]


def rank_of(job: str, logs: Path) -> psutil.Process | None:
    """The process that trains in the newest start of an array's member, if it is there."""
    array, _, member = job.partition("_")
    wanted = {
        "SLURM_ARRAY_JOB_ID": array,
        "SLURM_ARRAY_TASK_ID": member,
        "SLURM_RESTART_COUNT": str(restarts(job) or ""),
    }
    for process in psutil.process_iter():
        try:
            if process.cmdline()[1:] == ["-u", "-m", "submitit.core._submit", str(logs)]:
                environment = process.environ()
                if all(environment.get(key, "") == value for key, value in wanted.items()):
                    return process
        except psutil.Error:
            continue
    return None


def restart_slurmd(state: Path, meanwhile: Callable[[], object]) -> None:
    """Stop the daemon of node n1, whose jobs go on without it, and start it again."""
    daemon = psutil.Process(int((state / "pid" / "slurmd-n1").read_text()))
    daemon.terminate()
    daemon.wait(30)
    meanwhile()
    subprocess.run(["slurmd", "-N", "n1"], check=True, env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin"})


def test_ten_kills_at_random_moments_lose_nothing_and_count_nothing_twice(slurm_up, phantom_data, tmp_path):
    rows = {"U-Net": SUPERVISED, "MGCC": {}}
    asks = {"cpus": 1, "parallel": 2, "attempts": 5, "environment": {"OMP_NUM_THREADS": "1"}}
    changes = {"steps": STEPS, "seeds": [1, 2], "rows": rows, "resources": asks, "image_size": 16}
    sweep, quiet = (write_ready_sweep(tmp_path, phantom_data, name, **changes) for name in ("killed", "quiet"))
    undisturbed = subprocess.Popen(
        [sys.executable, "-m", "mgcc_dist.slurm", "submit", str(quiet), "--cluster", "debug"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    dispatch("submit", sweep)
    out = tmp_path / "killed"
    runs = {job_of(out, str(run.folder.relative_to(out))): run.folder for run in read_sweep(sweep).runs}
    chance = random.Random(3)
    # While it starts (0), or after some steps.
    kills = [(kind, max(0, chance.randint(-4, 10))) for kind in chance.sample(KINDS, len(KINDS))]
    least = dict.fromkeys(runs, 0)  # how often each must have been started again; after slurmd's stop it may be more

    def victim(steps: int) -> tuple[str, psutil.Process] | None:
        """A run that started since its last kill and has made `steps` steps since."""
        for job in chance.sample(sorted(runs), len(runs)):
            began[job] = min(began.get(job, STEPS), last_step(runs[job]))
            if not began[job] + steps <= last_step(runs[job]) <= LATEST or restarts(job) < least[job]:
                continue
            if (process := rank_of(job, out / "jobs")) and queue().get(job, ("",))[0] == "RUNNING":
                return job, process
        return None

    def go_on() -> None:
        hurry()
        assert not over(*runs), f"the sweep ended too soon, after {least}"

    for kind, steps in kills:
        began: dict[str, int] = {}
        job, process = until(lambda steps=steps: victim(steps), meanwhile=go_on)
        if not steps:
            time.sleep(chance.uniform(0, 2))
        if kind == "slurmd":
            reached = last_step(runs[job]) + 5
            further = functools.partial(
                until_in_slurm, lambda job=job, reached=reached: last_step(runs[job]) >= reached
            )
            restart_slurmd(slurm_up, further)
            continue
        least[job] = restarts(job) + 1
        if kind == "KILL":
            process.kill()
        else:
            notify(job, kind)

    until_in_slurm(lambda: over(job_of(out, "report")))
    said, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, said
    assert all(restarts(job) >= times for job, times in least.items())
    assert "5 tasks: 5 done" in dispatch("status", sweep)
    assert "4 of 4 runs are finished" in dispatch("logs", sweep, "report")
    for job, run in runs.items():
        assert_same_run(run, tmp_path / "quiet" / run.relative_to(out))
        trained = [row["step"] for row in read_rows(run / "metrics.jsonl") if row["split"] == "train"]
        assert trained == list(range(1, STEPS + 1))
        assert (out / "jobs" / f"{job}_0_log.out").read_text().count("at the best step ->") == 1
