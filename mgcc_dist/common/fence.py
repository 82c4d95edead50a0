"""A fencing number for run folders: a process that lost the lock of its folder without knowing it stops writing there.

A file server may take the lock away from a node that it can't reach, and Slurm restarts the node's job elsewhere. If
the node was only cut off, its processes still write. So each start that opens the folder increases the number in
`.fence`, and every writer first compares it with its own. Where a file system has no locks, the later of two processes
decides in the same way.

The number is not in `.lock`: closing any file handle of a locked file releases a POSIX lock. This file imports
torch only when a run starts.
"""

import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_object, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

FENCE = ".fence"

_own: dict[Path, dict[str, Any]] = {}
"""content of FENCE that this start of the run has written, by folder"""


def raise_fence(folder: Path, accelerator: "Accelerator") -> None:
    """Take over `folder` from all earlier starts of its run. Collective. Call it with the folder's lock."""
    from accelerate.utils import gather_object

    from mgcc_dist.common.distributed import raise_on_all_ranks

    own: dict[str, Any] = {}
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            own = {"number": _read(folder).get("number", 0) + 1, "holder": process_name()}
            write_json(folder / FENCE, own)
    _own[folder.resolve()] = gather_object([own])[0]


def fence_number(folder: Path) -> int:
    """Return the number of this start of the run; 0 if it has not opened the folder."""
    return _own.get(folder.resolve(), {}).get("number", 0)


def is_fenced_off(folder: Path) -> bool:
    """Return whether a later start of the run has taken over `folder`."""
    return folder.resolve() in _own and _read(folder) != _own[folder.resolve()]


def check_fence(folder: Path) -> None:
    """Check that this process may still write into `folder`.

    Raises:
        UserError: a later start of the run has taken it over.
    """
    if is_fenced_off(folder):
        raise UserError(
            f"{folder}: was taken over by {_read(folder).get('holder', 'another process')} while this process had no "
            "connection. It ends without writing there. The other process continues the run."
        )


def process_name() -> str:
    """Return `pid 12 on HOST` for this process; in a Slurm job, `pid 12 on HOST, Slurm job 3, restart 1`."""
    job, restart = slurm_start()
    return f"pid {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}, restart {restart}" if job else "")


def is_earlier_start(name: str) -> bool:
    """Return whether the process with this name belongs to an earlier start of the Slurm job of this process."""
    job, restart = slurm_start()
    found = re.search(r", Slurm job (\d+), restart (\d+)$", name)
    return found is not None and found[1] == job and int(found[2]) < restart


def slurm_start() -> tuple[str, int]:
    """Return this process's Slurm job, or "", and how often Slurm has restarted it. Each task of an array has a job."""
    return os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FENCE
    return read_object(path) if path.is_file() else {}
