"""End a process together with its launcher, so that it does not train on as an orphan."""

import ctypes
import os
import signal
import sys
from pathlib import Path

LAUNCHERS = {"accelerate", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}
PR_SET_PDEATHSIG = 1


def stop_with_launcher() -> None:
    """Make the kernel send this process SIGTERM when `accelerate launch` or torchrun, its parent, ends (Linux only).

    With one process `accelerate launch` forwards no signal, and no launcher can forward SIGKILL.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended, or belongs to another user
        return
    if LAUNCHERS & {Path(word).name for word in words[:4]}:  # python -u -m MODULE
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), signal.SIGTERM)
