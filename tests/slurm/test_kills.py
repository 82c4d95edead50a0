"""Five kills of four kinds at random moments of a sweep; every run finishes once, as in an undisturbed sweep."""

import functools
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ranks
from jobs import (
    dispatch,
    have_ended,
    job_of,
    last_step,
    queue,
    rank_of,
    read_log,
    restarts,
    send_signal,
    start_requeued_jobs,
    until,
    until_in_slurm,
)
from same_run import assert_same_run
from sweep_files import write_ready_sweep

from mgcc_dist.sweep.expansion import read_sweep
from mgcc_dist.train.metrics_logger import read_rows

pytestmark = pytest.mark.slurm

STEPS = 80
LATEST = 50
"""runs are not killed after this step, so that each kill finds its run alive"""
KINDS = ("USR2", "TERM", "KILL")


def restart_slurmd(state: Path, meanwhile: Callable[[], object]) -> None:
    """Stop the daemon of node n1, whose jobs keep running, and start it again."""
    daemon = psutil.Process(int((state / "pid" / "slurmd-n1").read_text()))
    daemon.terminate()
    daemon.wait(30)
    meanwhile()
    subprocess.run(["slurmd", "-N", "n1"], check=True, env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin"})


def test_random_kills_lose_no_step_and_repeat_none(slurm_up, phantom_data, tmp_path):
    resources = {"cpus": 1, "parallel": 2, "attempts": 5, "environment": {"OMP_NUM_THREADS": "1"}}
    changes = {"steps": STEPS, "seeds": [1, 2, 3], "rows": {"MGCC": {}}, "resources": resources, "image_size": 16}
    sweep, quiet = (write_ready_sweep(tmp_path, phantom_data, name, **changes) for name in ("killed", "quiet"))
    undisturbed = ranks.start(ranks.forked(1), ["-m", "mgcc_dist.slurm", "submit", quiet, "--cluster", "debug"])
    dispatch("submit", sweep)
    out = tmp_path / "killed"
    runs = {job_of(out, str(run.folder.relative_to(out))): run.folder for run in read_sweep(sweep).runs}
    chance = random.Random(3)
    kills = [("KILL", 0)]  # during start-up, like both signals in test_requeue
    kills += [(kind, chance.randint(1, 10)) for kind in (*KINDS, "slurmd")]  # after some steps
    chance.shuffle(kills)
    least = dict.fromkeys(runs, 0)  # minimum restarts; a stopped slurmd may add more

    def victim(steps: int) -> tuple[str, psutil.Process] | None:
        """Return a run that has restarted since its last kill and has trained for `steps` steps since."""
        for job in chance.sample(sorted(runs), len(runs)):
            first_step[job] = min(first_step.get(job, STEPS), last_step(runs[job]))
            if not first_step[job] + steps <= last_step(runs[job]) <= LATEST or restarts(job) < least[job]:
                continue
            if (process := rank_of(job, out / "jobs")) and queue().get(job, ("",))[0] == "RUNNING":
                return job, process
        return None

    def keep_running() -> None:
        start_requeued_jobs()
        assert not have_ended(*runs), f"the sweep ended too early, after {least}"

    for kind, steps in kills:
        first_step: dict[str, int] = {}
        job, process = until(lambda steps=steps: victim(steps), meanwhile=keep_running)
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
            send_signal(job, kind)

    until_in_slurm(lambda: have_ended(job_of(out, "report")))
    _, log = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, log
    assert all(restarts(job) >= times for job, times in least.items())
    assert "4 tasks: 4 done" in dispatch("status", sweep)
    assert "3 of 3 runs are finished" in dispatch("logs", sweep, "report")
    for job, run in runs.items():
        assert_same_run(run, tmp_path / "quiet" / run.relative_to(out))
        trained = [row["step"] for row in read_rows(run / "metrics.jsonl") if row["split"] == "train"]
        assert trained == list(range(1, STEPS + 1))
        assert read_log(out, job).count("at the best step ->") == 1
