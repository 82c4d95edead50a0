"""Run `mgcc_dist.slurm` commands, and observe and signal jobs of the testbed and their processes."""

import re
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import ranks

from mgcc_dist.common.files import read_json
from mgcc_dist.slurm.job_graph import build_tasks, write_configs
from mgcc_dist.sweep.expansion import read_sweep
from mgcc_dist.train.metrics_logger import read_rows


def dispatch(command: str, sweep: Path, *options: str, code: int = 0) -> str:
    """Run `python -m mgcc_dist.slurm COMMAND SWEEP ...`, check its exit code and return its output."""
    done = ranks.run(ranks.forked(1), ["-m", "mgcc_dist.slurm", command, sweep, *options])
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_without_slurm(path: Path, count: int) -> None:
    """Run the steps and runs of a sweep one after another, each on `count` ranks."""
    tasks = build_tasks(read_sweep(path), {}, "")
    write_configs(tasks)
    for task in tasks:
        if task.config_file:
            ranks.finish(ranks.forked(count), task.command)


def slurm(*command: str) -> str:
    """Return a Slurm command's output, whatever its exit code: the job may have left the queue in the meantime."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout


def queue() -> dict[str, tuple[str, str]]:
    """Return state and reason of every job in the queue."""
    return {job: (state, reason) for job, state, reason, _ in _queue()}


def _queue() -> list[list[str]]:
    """Return id, state, reason and the time of submission or requeue of every job in the queue."""
    return [line.split("|") for line in slurm("squeue", "-h", "--array", "-o", "%i|%T|%r|%V").splitlines()]


def until(condition: Callable[[], Any], seconds: float = 240, meanwhile: Callable[[], Any] = lambda: None) -> Any:
    """Wait until `condition` is true and return its value; call `meanwhile` about once a second."""
    start = last = time.monotonic()
    while not (result := condition()):
        now = time.monotonic()
        assert now < start + seconds, "timed out"
        if now > last + 1:
            last = now
            meanwhile()
        time.sleep(0.3)  # each look may start several programs of Slurm
    return result


def until_in_slurm(condition: Callable[[], Any], seconds: float = 240) -> Any:
    """Wait until `condition` is true; skip most of Slurm's two-minute delay of requeued jobs."""
    return until(condition, seconds, start_requeued_jobs)


def start_requeued_jobs() -> None:
    """Let requeued jobs start two seconds after the requeue.

    A job that starts in the second in which its node was asked to end it fails with "Job credential revoked".
    """
    before = datetime.now() - timedelta(seconds=2)
    for job, state, reason, since in _queue():
        if (state, reason) == ("PENDING", "BeginTime") and datetime.fromisoformat(since) < before:
            slurm("scontrol", "update", f"JobId={job}", "StartTime=now")


def job_of(out: Path, task: str) -> str:
    """Return the id of the latest job of the only task whose name starts with `task`."""
    (job,) = [job for name, job in read_json(out / "jobs.json")["jobs"].items() if name.startswith(task)]
    return job


def read_log(out: Path, job: str, name: str = "0") -> str:
    """Return what a rank of a job, or a packed run, wrote to standard output and then to standard error."""
    stdout, stderr = (out / "jobs" / f"{job}_{name}_log.{kind}" for kind in ("out", "err"))
    return stdout.read_text() + stderr.read_text()


def restarts(job: str) -> int:
    """Return how often Slurm has restarted a job; 0 once it has forgotten the job."""
    match = re.search(r" Restarts=(\d+)", slurm("scontrol", "show", "job", "-o", job))
    return int(match.group(1)) if match else 0


def send_signal(job: str, signal: str) -> None:
    """Send a job a signal and wait until it is requeued.

    scancel repeats the signal for a minute while the job is being requeued, so stop it then.
    """
    before = restarts(job)
    sending = subprocess.Popen(["scancel", f"--signal={signal}", job])
    try:
        until(lambda: restarts(job) > before)
    finally:
        sending.kill()
        sending.wait()


def last_step(run: Path) -> int:
    """Return the step of the latest row of metrics; 0 before the first."""
    rows = read_rows(run / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def rank_of(job: str, logs: Path) -> psutil.Process | None:
    """Return the training process of the latest start of an array task, if it is running."""
    array, _, index = job.partition("_")
    wanted = {
        "SLURM_ARRAY_JOB_ID": array,
        "SLURM_ARRAY_TASK_ID": index,
        "SLURM_RESTART_COUNT": str(restarts(job) or ""),
    }
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if command[1:3] == ["-u", "-m"] and command[-1] == str(logs):  # submitit's entry point
                environment = process.environ()
                if all(environment.get(key, "") == value for key, value in wanted.items()):
                    return process
        except psutil.Error:
            continue
    return None


def have_ended(*jobs: str) -> bool:
    waiting = queue()
    return not any(job in waiting for job in jobs)
