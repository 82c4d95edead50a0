"""A lock on an output folder, so that two processes never write into it at the same time."""

import errno
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import IO

from accelerate import Accelerator

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.fence import is_earlier_start, process_name
from mgcc_dist.common.files import create_folder, remove_scratch

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""file that is locked; it names the process that holds the lock, or held it last"""

SLURM_WAIT = 60.0
"""seconds that a Slurm job waits for the lock"""

_held: dict[Path, IO[str]] = {}
"""locked files of this process, which keeps them open until it ends"""


def lock_folder(folder: Path, accelerator: Accelerator) -> None:
    """Lock `folder` on the main process until that process ends, however it ends, and tidy it up. Collective.

    The lock is a POSIX record lock: the kernel releases it with the process, also across NFS, and DataLoader workers do
    not inherit it. Locking the same folder again in the same process does nothing.

    Raises:
        UserError: another process holds the lock, or the folder can't be created or written.
    """
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            lock(folder)


def lock(folder: Path) -> None:
    """Lock `folder` in this process, as `lock_folder` does.

    In a Slurm job, wait a minute for another process: the job's earlier start may still be ending. One on a node that
    Slurm took for dead may never end. The folder is then used without the lock, and the fence (common/fence.py) stops
    the other process.

    Raises:
        UserError: as `lock_folder`.
    """
    path = folder.resolve() / LOCK
    if path in _held and path.exists():  # else the folder was removed since
        return
    create_folder(folder)
    try:
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"--out {folder}: can't be written ({error.strerror}). Choose another --out.") from error
    deadline = time.monotonic() + (SLURM_WAIT if "SLURM_JOB_ID" in os.environ else 0)
    waited = False
    while refusal := _try_lock(file):
        file.seek(0)
        holder = file.read().strip()
        if refusal.errno not in (errno.EACCES, errno.EAGAIN):
            file.close()
            logger.warning(
                "%s: its file system supports no locks (%s). Make sure that only one process writes there.",
                *(folder, refusal.strerror),
            )
            return
        if time.monotonic() < deadline:
            if not waited:
                logger.info("%s: is in use by another process (%s); waiting up to a minute for it", folder, holder)
            waited = True
            time.sleep(0.5)
            continue
        file.close()
        if is_earlier_start(holder):
            logger.warning("%s: taken over from an earlier start of this job (%s), which still runs", folder, holder)
            return
        raise UserError(
            f"{folder}: is in use by another process{f' ({holder})' if holder else ''}. "
            "Wait for it to finish, stop it, or choose another --out."
        ) from refusal
    file.truncate(0)
    file.write(f"{process_name()}\n")
    file.flush()
    _held[path] = file
    remove_scratch(folder)


def _try_lock(file: IO[str]) -> OSError | None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None
