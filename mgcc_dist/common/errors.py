"""Errors that are meant for the user, exit codes, and the frame that every program runs in."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad input or configuration. Its text is shown without a stack trace."""


class SharedError(UserError):
    """A UserError that all ranks raise at the same point, so only rank 0 prints it."""


EXIT_USER_ERROR = 2
"""Exit code after a UserError or a full disk; running the same command again does not help."""
EXIT_STOPPED = 75
"""Exit code of a run that saved itself after a signal (EX_TEMPFAIL); rerun the same command to resume."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_program(program: str, main: Callable[[], None]) -> None:
    """Set up logging and run `main`.

    The exit code is 0 after success, EXIT_USER_ERROR after a UserError or a full disk, which are printed to stderr as
    `program: message`, EXIT_STOPPED after a signal, and 1 after any other exception.
    """
    from mgcc_dist.common.log import configure_logging  # which imports this module

    rank = os.environ.get("RANK", "0")
    prefix = program if rank == "0" else f"{program} [rank {rank}]"
    try:
        configure_logging()
        main()
        sys.stdout.flush()
    except UserError as error:
        if rank == "0" or not isinstance(error, SharedError):
            print(f"{prefix}: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:  # as in `mgcc sweep FILE | head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        remedy = "What was saved so far is kept. Free some space and rerun the same command to resume."
        print(f"{prefix}: {error}. {remedy}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return " Did you mean X?" for the names in `known` that are nearest to `word`, or "" if none is near.

    A dotted name is also near its own last part: `epochs` means `loop.epochs`.
    """
    names = {name.lower(): name for name in known}
    nearest = [name for name in names if name.rpartition(".")[2] == word.lower()][:3]
    nearest = nearest or difflib.get_close_matches(word.lower(), names, n=1)
    return f" Did you mean {' or '.join(prefix + names[name] for name in nearest)}?" if nearest else ""
