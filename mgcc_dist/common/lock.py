"""A lock on an output folder, so that two processes never write into it at the same time."""

import errno
import fcntl
import logging
from pathlib import Path
from typing import IO

from accelerate import Accelerator

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.fence import process_name
from mgcc_dist.common.files import create_folder, remove_scratch

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""file that is locked; it names the process that holds the lock, or held it last"""

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
    """Lock `folder` in this process, as `lock_folder` does. Raises UserError."""
    path = folder.resolve() / LOCK
    if path in _held and path.exists():  # else the folder was removed since
        return
    create_folder(folder)
    try:
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"--out {folder}: can't be written ({error.strerror}). Choose another --out.") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"{folder}: is in use by another process{f' ({holder})' if holder else ''}. "
                "Wait for it to finish, stop it, or choose another --out."
            ) from error
        logger.warning(
            "%s: its file system supports no locks (%s). Make sure that only one process writes there.",
            *(folder, error.strerror),
        )
        return
    file.truncate(0)
    file.write(f"{process_name()}\n")
    file.flush()
    _held[path] = file
    remove_scratch(folder)
