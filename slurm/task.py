"""What runs inside a job: one program of the package, in the process that Slurm started and signals."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from mgcc_dist.errors import EXIT_USER_ERROR
from mgcc_dist.files import read_json, write_json

ATTEMPTS = "attempts.json"


class Program:
    """A program as submitit wants it: called on every rank, asked by rank 0's `checkpoint` to go on after a requeue.

    A signal that arrives while the program trains is the program's: it saves on all ranks and exits with EXIT_STOPPED,
    and rank 0 then requeues the job as submitit's own handler would have done. At any other time that handler acts.
    """

    def __init__(self, command: list[str], folder: Path, makes: Path, attempts: int) -> None:
        self.command = command
        self.folder = folder
        self.makes = makes
        self.attempts = attempts

    def __call__(self) -> None:
        rank = JobEnvironment().global_rank
        requeue = signal.getsignal(signal.SIGUSR2)
        if rank == 0:
            count_attempt(self.folder, self.makes, self.attempts)
        from mgcc_dist.train.signals import EXIT_STOPPED  # here, because torch takes seconds and submitting needs none

        module, *words = self.command[1:]
        sys.argv = [module, *words]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as exit:
            if exit.code != EXIT_STOPPED:
                raise
            if rank == 0 and callable(requeue) and not is_cancelled():
                requeue(signal.SIGUSR2, None)
            elif rank == 0:
                raise

    def checkpoint(self) -> DelayedSubmission:
        forgive_attempt(self.folder)  # being told to stop is no failure
        return DelayedSubmission(self)


def count_attempt(folder: Path, makes: Path, limit: int) -> None:
    """Count a start in FOLDER/attempts.json, from 1 again when checkpoints have moved on since the last one.

    Raises:
        SystemExit: this start would be one more than `limit` without progress.
    """
    steps = (int(path.name.removeprefix("step-")) for path in makes.parent.glob("checkpoints/step-*"))
    step = max(steps, default=0)
    before = attempts_of(folder)
    attempts = (before["attempts"] if before["step"] == step else 0) + 1
    if attempts > limit:
        print(
            f"{folder}: given up after {limit} starts without progress from step {step}; mend the cause, then "
            f"`python -m mgcc_dist.slurm resume` starts it again",
            file=sys.stderr,
        )
        sys.exit(EXIT_USER_ERROR)
    write_json(folder / ATTEMPTS, {"attempts": attempts, "step": step})


def attempts_of(folder: Path) -> dict[str, int]:
    """Starts without progress so far, and the step from which they were."""
    path = folder / ATTEMPTS
    return read_json(path) if path.is_file() else {"attempts": 0, "step": 0}


def forgive_attempt(folder: Path) -> None:
    before = attempts_of(folder)
    write_json(folder / ATTEMPTS, before | {"attempts": max(0, before["attempts"] - 1)})


def is_cancelled() -> bool:
    """Whether Slurm is ending this job for good (scancel): to requeue it would bring it back to life."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return False
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=False).stdout
    return "JobState=CANCELLED" in shown
