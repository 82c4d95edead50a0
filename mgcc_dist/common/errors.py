"""Errors that are meant for the user, exit codes, and the frame that every program runs in."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
    """Bad input or configuration. Its text is shown without a stack trace."""


class SharedError(UserError):
    """A UserError that all ranks raise at the same point, so only rank 0 prints it."""


EXIT_USER_ERROR = 2
"""Exit code after a UserError or a full disk: the user has to act before a rerun."""
EXIT_STOPPED = 75
"""Exit code of a run that saved itself after a signal (EX_TEMPFAIL); rerun the same command to resume."""
EXTRAS = {"submitit": "slurm", "kornia": "augment", "optuna": "search", "transformers": "encoders"}
"""optional packages that a program may need, and the extra that installs them"""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_program(program: str, main: Callable[[], None]) -> None:
    """Set up logging and run `main`.

    The exit code is 0 after success, EXIT_USER_ERROR after a UserError, a full disk or a missing optional package,
    which are printed to stderr as `program: message`, EXIT_STOPPED after a signal, and 1 after any other exception.
    """
    from mgcc_dist.common.launcher import stop_with_launcher
    from mgcc_dist.common.log import configure_logging  # which imports this module

    stop_with_launcher()
    try:
        configure_logging()
        main()
        sys.stdout.flush()
    except UserError as error:
        _exit(program, str(error), only_rank_0=isinstance(error, SharedError))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _exit(program, f"{error.name} is not installed. Run `pip install 'mgcc-dist[{EXTRAS[error.name]}]'`.")
    except BrokenPipeError:  # as in `mgcc sweep FILE | head`, where nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _exit(program, f"{error}. What was saved so far is kept. Free some space and rerun the same command to resume.")


def one_line(text: str) -> str:
    """Escape control characters, such as a newline in a file name, so that a message stays one line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)


def _exit(program: str, message: str, only_rank_0: bool = False) -> NoReturn:
    message = one_line(message)
    rank = os.environ.get("RANK", "0")  # under Slurm it is set only once the process has joined its group
    if rank == "0":
        print(f"{program}: {message}", file=sys.stderr)
    elif not only_rank_0:
        print(f"{program} [rank {rank}]: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return " Did you mean X?" for the names in `known` that are nearest to `word`, or "" if none is near.

    A dotted name is also near its own last part: `epochs` means `loop.epochs`.
    """
    names = {name.lower(): name for name in known}
    nearest = [name for name in names if name.rpartition(".")[2] == word.lower()][:3]
    nearest = nearest or difflib.get_close_matches(word.lower(), names, n=1)
    return f" Did you mean {' or '.join(prefix + names[name] for name in nearest)}?" if nearest else ""
