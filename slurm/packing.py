"""Run several programs of one task on one GPU, each with its own process, log and run folder."""

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from submitit import JobEnvironment

from mgcc_dist.common.errors import EXIT_STOPPED, EXIT_USER_ERROR
from mgcc_dist.slurm.worker import (
    PREEMPTION_SIGNALS,
    Program,
    give_up,
    read_attempts,
    record_attempt,
    undo_attempt,
)

EXIT_FAILED = 1


class PackedPrograms:
    """Programs that run at the same time, as a submitit callable; a requeued job starts the unfinished ones.

    If a program fails, the others continue, and the task fails once all have ended. On a preemption signal each program
    receives one SIGINT. Only one, because Slurm may also have signalled all processes of the task, and a second signal
    of the same kind would end a run before it has saved.
    """

    def __init__(self, programs: Mapping[str, Program], logs: Path) -> None:
        self.programs = dict(programs)
        """by the name of their log"""
        self.logs = logs

    def __call__(self) -> None:
        job = JobEnvironment().job_id
        processes: dict[str, subprocess.Popen] = {}
        signalled = set[str]()
        is_preempted = False

        def forward_once(_number: int, _frame: FrameType | None) -> None:
            nonlocal is_preempted
            is_preempted = True
            for name in processes.keys() - signalled:
                signalled.add(name)
                processes[name].send_signal(signal.SIGINT)

        for number in (*PREEMPTION_SIGNALS, signal.SIGINT):
            signal.signal(number, forward_once)
        for name, program in self.programs.items():
            if not is_preempted and program in self.unfinished() and _has_attempts_left(program):
                out, err = (self.logs / f"{job}_{name}_log.{kind}" for kind in ("out", "err"))
                with out.open("ab") as stdout, err.open("ab") as stderr:
                    command = [sys.executable, "-u", *program.command]
                    processes[name] = subprocess.Popen(
                        command, stdout=stdout, stderr=stderr, preexec_fn=_restore_sigint
                    )
        if is_preempted:
            forward_once(signal.SIGINT, None)  # to a process that was just starting
        for process in processes.values():
            process.wait()

        for number in PREEMPTION_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        missing = {name: program for name, program in self.programs.items() if not program.output.is_file()}
        for name, program in missing.items():
            code = processes[name].returncode if name in processes else None
            print(f"{name}: {'not started' if code is None else f'exit status {code}'}", file=sys.stderr)
            if code == EXIT_USER_ERROR:
                give_up(program.folder)
            elif is_preempted and code is not None and (code == EXIT_STOPPED or code < 0):
                undo_attempt(program.folder)
        if missing:
            sys.exit(EXIT_STOPPED if is_preempted else EXIT_FAILED)

    def unfinished(self) -> list[Program]:
        """Return the programs that another start of the job would run."""
        missing = [program for program in self.programs.values() if not program.output.is_file()]
        return [program for program in missing if not read_attempts(program.folder).get("hopeless")]


def _has_attempts_left(program: Program) -> bool:
    """Record a start of `program` and return whether it is within its attempts."""
    try:
        record_attempt(program.folder, program.output, program.max_attempts)
    except SystemExit:  # after printing the reason
        return False
    return True


def _restore_sigint() -> None:
    """Restore SIGINT's default in the child: this process may ignore it, as background jobs of a shell do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
