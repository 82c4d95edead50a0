"""Errors that are for the user: one line that says what was wrong, where, and what to do."""

import errno
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input or configuration. Its text is shown as it is, without a stack trace."""


class SharedError(UserError):
    """One that all ranks raise at the same place, so rank 0 alone prints it."""


EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""Exit code of a run that a signal stopped after it saved itself (EX_TEMPFAIL): start it again and it goes on."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_program(program: str, main: Callable[[], None]) -> None:
    """Run `main`; a UserError, or a full disk, becomes `program: message` on stderr and exit code 2."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" [rank {rank}]"
    try:
        main()
    except UserError as error:
        if rank == "0" or not isinstance(error, SharedError):
            print(f"{program}{where}: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        print(
            f"{program}{where}: {error}; what was saved before is kept: make room, and the same command goes on",
            file=sys.stderr,
        )
        sys.exit(EXIT_USER_ERROR)
