"""What runs inside a job: one program of the package, in the process that Slurm started and signals."""

import runpy
import signal
import sys
from pathlib import Path
from types import FrameType

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from mgcc_dist.common.errors import EXIT_STOPPED, EXIT_USER_ERROR
from mgcc_dist.common.files import read_json, write_json
from mgcc_dist.slurm import cluster

ATTEMPTS = "attempts.json"
NOTICES = (signal.SIGUSR2, signal.SIGTERM)
"""Slurm's word that the job has to go: before the time limit, and at preemption"""


class Program:
    """A program as submitit wants it: called on every rank, asked by rank 0's `checkpoint` to go on after a requeue.

    A notice that arrives while the program trains is the program's: it saves on all ranks and exits with EXIT_STOPPED.
    At any other time rank 0 ends at once; files appear by rename, so nothing is half there. In both cases rank 0 then
    requeues the job, unless Slurm has done so already or ends it for good.
    """

    def __init__(self, command: list[str], folder: Path, makes: Path, attempts: int) -> None:
        self.command = command
        self.folder = folder
        self.makes = makes
        self.attempts = attempts

    def __call__(self) -> None:
        is_first = JobEnvironment().global_rank == 0
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's, which other ranks keep: there it does nothing

        def leave() -> None:
            for number in NOTICES:
                signal.signal(number, signal.SIG_IGN)
            forgive_attempt(self.folder)
            if callable(requeue) and cluster.is_this_job_running():
                requeue(signal.SIGUSR2, None)  # ends this process

        def leave_at_once(number: int, _frame: FrameType | None) -> None:
            leave()
            sys.exit(128 + number)

        if is_first:
            for number in NOTICES:
                signal.signal(number, leave_at_once)
            count_attempt(self.folder, self.makes, self.attempts)
        module, *words = self.command[1:]
        sys.argv = [module, *words]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as exit:
            if is_first and exit.code == EXIT_USER_ERROR:
                give_up(self.folder)
            if is_first and exit.code == EXIT_STOPPED:
                leave()
            if is_first or exit.code != EXIT_STOPPED:
                raise

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(self)

    def left(self) -> list["Program"]:
        """What another start would carry out."""
        return [self]


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
        give_up(folder)
        sys.exit(EXIT_USER_ERROR)
    write_json(folder / ATTEMPTS, {"attempts": attempts, "step": step})


def attempts_of(folder: Path) -> dict[str, int]:
    """Starts without progress so far, and the step from which they were; "hopeless" where a further one can't help."""
    path = folder / ATTEMPTS
    return read_json(path) if path.is_file() else {"attempts": 0, "step": 0}


def forgive_attempt(folder: Path) -> None:
    """Being told to stop is no failure."""
    before = attempts_of(folder)
    write_json(folder / ATTEMPTS, before | {"attempts": max(0, before["attempts"] - 1)})


def give_up(folder: Path) -> None:
    """Not to be started again: what the user has asked for can't be done, or was tried too often."""
    write_json(folder / ATTEMPTS, attempts_of(folder) | {"hopeless": True})
