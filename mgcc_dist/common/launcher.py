"""The launcher of this process: what its command line says, and an end together with it instead of as an orphan."""

import ctypes
import os
import signal
import sys
from itertools import pairwise
from pathlib import Path

LAUNCHERS = {
    *("accelerate", "accelerate-launch", "accelerate.commands.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
    *("deepspeed", "deepspeed.launcher.launch"),
}
"""programs and modules that start ranks"""
PR_SET_PDEATHSIG = 1


def stop_with_launcher() -> None:
    """Make the kernel send this process SIGTERM when the launcher that is its parent ends (Linux only).

    With one process `accelerate launch` forwards no signal, and no launcher can forward SIGKILL.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    if launcher_words():
        stop_with_parent(parent, signal.SIGTERM)


def stop_with_parent(parent: int, number: signal.Signals) -> None:
    """Make the kernel send this process a signal when its parent, the process `parent`, ends (Linux only)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), number)


def launcher_words() -> list[str]:
    """Return the command line of the launcher, if it is the parent of this process (Linux only)."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended, or belongs to another user
        return []
    return words if LAUNCHERS & {Path(word).name for word in words[:5]} else []  # python -u -m MODULE


def launcher_option(name: str) -> str | None:
    """Return the value of an option of `accelerate launch`, such as `gradient_clipping`; None if it was not given."""
    if value := os.environ.get(f"ACCELERATE_{name.upper()}"):
        return value
    for word, following in pairwise([*launcher_words(), ""]):
        option, equals, value = word.partition("=")
        if option == f"--{name}":
            return value if equals else following
    return None
