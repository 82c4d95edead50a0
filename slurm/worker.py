"""The code that runs inside a Slurm job: one program of the package, in the process that Slurm starts and signals."""

import runpy
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from submitit import JobEnvironment

from mgcc_dist.common.errors import EXIT_STOPPED, EXIT_USER_ERROR
from mgcc_dist.common.fence import slurm_start
from mgcc_dist.common.files import read_json, write_json

ATTEMPTS_FILE = "attempts.json"
PREEMPTION_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""sent by Slurm before the time limit and at preemption"""


class Program:
    """A program as a submitit callable, called on every rank.

    While the program trains, it handles preemption signals itself: it saves on all ranks and exits with EXIT_STOPPED.
    At any other time rank 0 exits at once; files are written by rename, so none is left half-written. In both cases
    the batch script then requeues the job (`retry`), unless Slurm has already done so or is ending the job for good.
    """

    def __init__(self, command: list[str], folder: Path, output: Path, max_attempts: int) -> None:
        self.command = command
        self.folder = folder
        self.output = output
        self.max_attempts = max_attempts

    def __call__(self) -> None:
        is_rank_0 = JobEnvironment().global_rank == 0

        def leave() -> None:
            for number in PREEMPTION_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            if is_attempt_recorded(self.folder):
                undo_attempt(self.folder)

        def leave_at_once(number: int, _frame: FrameType | None) -> None:
            leave()
            sys.exit(128 + number)

        if is_rank_0:
            for number in PREEMPTION_SIGNALS:
                signal.signal(number, leave_at_once)
            record_attempt(self.folder, self.output, self.max_attempts)
        module, *arguments = self.command[1:]
        sys.argv = [module, *arguments]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as exit:
            if is_rank_0 and exit.code == EXIT_USER_ERROR and is_attempt_recorded(self.folder):
                give_up(self.folder)
            if is_rank_0 and exit.code == EXIT_STOPPED:
                leave()
            # srun ends the job step at the first exit code, which has to be that of rank 0.
            if is_rank_0 or exit.code != EXIT_STOPPED:
                raise

    def unfinished(self) -> list["Program"]:
        """Return the programs that another start of the job would run."""
        return [self]


def record_attempt(folder: Path, output: Path, max_attempts: int) -> None:
    """Count a start in FOLDER/attempts.json; the count restarts when there is progress since the last time.

    Progress is a newer checkpoint, or for a search another finished trial.

    Raises:
        SystemExit: this start would exceed `max_attempts` without progress.
    """
    steps = (int(path.name.removeprefix("step-")) for path in output.parent.glob("checkpoints/step-*"))
    step = max(steps, default=len([*output.parent.glob("trial_*/result.json")]))
    previous = read_attempts(folder)
    attempts = (previous["attempts"] if previous["step"] == step else 0) + 1
    if attempts > max_attempts:
        print(
            f"{folder}: giving up after {max_attempts} attempts without progress (step {step}). Fix the cause, then "
            "run `mgcc slurm resume SWEEP`.",
            file=sys.stderr,
        )
        give_up(folder)
        sys.exit(EXIT_USER_ERROR)
    write_json(folder / ATTEMPTS_FILE, {"attempts": attempts, "step": step, **_this_start()})


def is_attempt_recorded(folder: Path) -> bool:
    """Return whether the last start that a program has recorded is the current start of this job.

    It is a later one if Slurm took this node for dead and started the job elsewhere.
    """
    return read_attempts(folder).items() >= _this_start().items()


def _this_start() -> dict[str, str | int]:
    job, restarts = slurm_start()
    return {"job": job, "restarts": restarts}


def read_attempts(folder: Path) -> dict[str, Any]:
    """Return the number of starts without progress, their step, and of the last one the job and its restarts before.

    "signalled" is set if the last start was preempted, "hopeless" if another start cannot help.
    """
    path = folder / ATTEMPTS_FILE
    return read_json(path) if path.is_file() else {"attempts": 0, "step": 0}


def undo_attempt(folder: Path) -> None:
    """Subtract the current start from the count: a preemption is not a failure."""
    previous = read_attempts(folder)
    write_json(folder / ATTEMPTS_FILE, previous | {"attempts": max(0, previous["attempts"] - 1), "signalled": True})


def give_up(folder: Path) -> None:
    """Mark a program as not worth another start: its settings are invalid, or all attempts are used."""
    write_json(folder / ATTEMPTS_FILE, read_attempts(folder) | {"hopeless": True})
