"""Several runs of one task on one GPU: each a process, a log and a run folder of its own."""

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from mgcc_dist.common.errors import EXIT_STOPPED, EXIT_USER_ERROR
from mgcc_dist.slurm import cluster
from mgcc_dist.slurm.task import NOTICES, Program, attempts_of, count_attempt, forgive_attempt, give_up

EXIT_FAILED = 1


class SharedPrograms:
    """Programs that run side by side, as submitit wants it; after a requeue those that are not done go on.

    One that fails leaves the others alone; the task fails when all have ended. A notice reaches every one of them once,
    as SIGINT: Slurm may also have sent the notice itself to all processes of the task, and the second of a kind would
    end a run before it has saved itself.
    """

    def __init__(self, programs: Mapping[str, Program], logs: Path) -> None:
        self.programs = dict(programs)
        """by the name that their log has"""
        self.logs = logs

    def __call__(self) -> None:
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
        job = JobEnvironment().job_id
        processes: dict[str, subprocess.Popen] = {}
        heard = set[str]()
        told = False

        def tell(_number: int, _frame: FrameType | None) -> None:
            nonlocal told
            told = True
            for name in processes.keys() - heard:
                heard.add(name)
                processes[name].send_signal(signal.SIGINT)

        for number in (*NOTICES, signal.SIGINT):
            signal.signal(number, tell)
        for name, program in self.programs.items():
            if not told and program in self.left() and _is_counted(program):
                out, err = (self.logs / f"{job}_{name}_log.{kind}" for kind in ("out", "err"))
                with out.open("ab") as to_out, err.open("ab") as to_err:
                    words = [sys.executable, "-u", *program.command]
                    processes[name] = subprocess.Popen(words, stdout=to_out, stderr=to_err, preexec_fn=_hear)
        if told:
            tell(signal.SIGINT, None)  # one that was just being started
        for process in processes.values():
            process.wait()

        for number in NOTICES:
            signal.signal(number, signal.SIG_IGN)
        unfinished = {name: program for name, program in self.programs.items() if not program.makes.is_file()}
        for name, program in unfinished.items():
            code = processes[name].returncode if name in processes else None
            print(f"{name}: {'not started' if code is None else f'exit status {code}'}", file=sys.stderr)
            if code == EXIT_USER_ERROR:
                give_up(program.folder)
            elif told and code is not None and (code == EXIT_STOPPED or code < 0):
                forgive_attempt(program.folder)
        if told and self.left() and callable(requeue) and cluster.is_this_job_running():
            requeue(signal.SIGUSR2, None)  # ends this process
        if unfinished:
            sys.exit(EXIT_STOPPED if told else EXIT_FAILED)

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(self)

    def left(self) -> list[Program]:
        """What another start would carry out."""
        open_ = [program for program in self.programs.values() if not program.makes.is_file()]
        return [program for program in open_ if not attempts_of(program.folder).get("hopeless")]


def _is_counted(program: Program) -> bool:
    """Whether this start is one of those that `program` has."""
    try:
        count_attempt(program.folder, program.makes, program.attempts)
    except SystemExit:  # it has said why
        return False
    return True


def _hear() -> None:
    """In the process to be: SIGINT may be ignored where this one comes from, as by a shell's background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
