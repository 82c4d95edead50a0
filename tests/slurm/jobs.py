"""The dispatcher's command line, and jobs of the testbed looked at and disturbed."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mgcc_dist.common.files import read_json
from mgcc_dist.train.metrics_logger import read_rows


def dispatch(command: str, sweep: Path, *words: str, code: int = 0) -> str:
    """What `python -m mgcc_dist.slurm COMMAND SWEEP ...` prints; it must end with `code`."""
    asked = [sys.executable, "-m", "mgcc_dist.slurm", command, str(sweep), *words]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def slurm(*command: str) -> str:
    """What a command of Slurm prints, whatever its exit code: a job may have left the queue meanwhile."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout


def queue() -> dict[str, tuple[str, str]]:
    """State and reason of every job that is not over."""
    return {job: (state, reason) for job, state, reason, _ in _queue()}


def _queue() -> list[list[str]]:
    """Also when each job was submitted or, later, requeued."""
    return [line.split("|") for line in slurm("squeue", "-h", "--array", "-o", "%i|%T|%r|%V").splitlines()]


def until(condition: Callable[[], Any], seconds: float = 240, meanwhile: Callable[[], Any] = lambda: None) -> Any:
    """Wait for `condition`, and give what it gives; `meanwhile` is called now and then."""
    begin = last = time.monotonic()
    while not (result := condition()):
        now = time.monotonic()
        assert now < begin + seconds, "waited in vain"
        if now > last + 0.5:
            last = now
            meanwhile()
        time.sleep(0.1)
    return result


def until_in_slurm(condition: Callable[[], Any], seconds: float = 240) -> Any:
    """Wait for `condition`; requeued jobs start without most of Slurm's two minutes of delay."""
    return until(condition, seconds, hurry)


def hurry() -> None:
    """Let requeued jobs start.

    Not at once: a node refuses what is started in the second in which it was told to end the job ("Job credential
    revoked"), and Slurm then calls the job failed.
    """
    before = datetime.now() - timedelta(seconds=2)
    for job, state, reason, since in _queue():
        if (state, reason) == ("PENDING", "BeginTime") and datetime.fromisoformat(since) < before:
            slurm("scontrol", "update", f"JobId={job}", "StartTime=now")


def job_of(out: Path, task: str) -> str:
    """Id of the latest job of the one task of a sweep whose name begins so."""
    (job,) = [job for name, job in read_json(out / "jobs.json")["jobs"].items() if name.startswith(task)]
    return job


def restarts(job: str) -> int:
    """How often Slurm has started a job again that it still knows."""
    match = re.search(r" Restarts=(\d+)", slurm("scontrol", "show", "job", "-o", job))
    return int(match.group(1)) if match else 0


def notify(job: str, number: str) -> None:
    """Send a job a signal after which it is requeued.

    scancel tries again, for a minute, while a job is on its way back into the queue; so it is stopped then.
    """
    before = restarts(job)
    sending = subprocess.Popen(["scancel", f"--signal={number}", job])
    try:
        until(lambda: restarts(job) > before)
    finally:
        sending.kill()
        sending.wait()


def last_step(run: Path) -> int:
    """The newest row's; 0 before the first."""
    rows = read_rows(run / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def over(*jobs: str) -> bool:
    waiting = queue()
    return not any(job in waiting for job in jobs)
