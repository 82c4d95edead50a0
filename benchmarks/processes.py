"""Child processes: commands with a deadline, and forks that start in milliseconds."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path


def fork_context() -> ForkServerContext:
    """Return a context whose processes are forked from one that has imported torch, but not initialised CUDA."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step"])
    return context


def raise_on_sigterm() -> None:
    """Turn SIGTERM into KeyboardInterrupt, so that `Child.wait` forwards both to the child."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class Child:
    """A command that gets SIGTERM at its deadline, and SIGKILL `grace` seconds later if it has not ended.

    With `log` its output goes there, and it leads a session of its own, of which nothing survives it.
    """

    def __init__(self, command: list[str], seconds: float, grace: float, log: Path | None = None) -> None:
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.grace = grace
        self.timed_out = False
        self.own_session = log is not None
        output = log.open("ab") if log else None
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=self.own_session,
            )
        finally:
            if output:
                output.close()

    def wait(self) -> int:
        """Return the exit status, negative for a signal.

        Raises:
            KeyboardInterrupt: Ctrl-C, or SIGTERM after `raise_on_sigterm`; the child was terminated and has ended.
        """
        try:
            return self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.timed_out = True
            return self.terminate()
        except KeyboardInterrupt:
            self.terminate()
            raise
        finally:
            self._end_session()

    def terminate(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(self.grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self._end_session()

    def _end_session(self) -> None:
        """Kill what the child started and left behind, such as workers of a process that was killed."""
        if self.own_session and self.process.poll() is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
