"""Errors that are meant for the user, exit codes, and the frame that every program runs in."""

import atexit
import difflib
import errno
import gc
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import NoReturn

from mgcc_dist.common.rank_errors import (
    claim_report,
    is_lost_connection,
    is_timeout,
    rank,
    reported_exit_code,
    wrong_variable,
)


class UserError(Exception):
    """Bad input or configuration. Its text is shown without a stack trace."""


class SharedError(UserError):
    """A UserError that all ranks raise at the same point, so only rank 0 prints it."""


EXIT_USER_ERROR = 2
"""Exit code after a UserError or a full disk: the user has to act before a rerun."""
EXIT_STOPPED = 75
"""Exit code of a run that saved itself after a signal (EX_TEMPFAIL); rerun the same command to resume."""
EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, where nothing had to be saved."""
EXTRAS = {
    **{"submitit": "slurm", "kornia": "augment", "optuna": "search", "transformers": "encoders"},
    **{"starlette": "serve", "uvicorn": "serve"},
    **{"pydicom": "clinic", "highdicom": "clinic", "nibabel": "clinic"},
    **{"onnx": "export", "onnxscript": "export", "onnxruntime": "export", "openvino": "openvino"},
}
"""optional packages that a program may need, and the extra that installs them"""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: a quota, or `ulimit -f`
REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EMFILE, errno.ENFILE),
)
"""errors of files that the user can do something about, and a traceback does not help"""


def run_program(program: str, main: Callable[[], None]) -> None:
    """Set up logging and run `main`.

    The exit code is 0 after success, EXIT_STOPPED after a signal, EXIT_USER_ERROR after an error that a user can do
    something about (a UserError, a full disk, a file that the system refuses, a missing optional package) and 1 after
    any other exception. Errors of the user are printed to stderr as `program: message`, by one rank of several.
    """
    from mgcc_dist.common.launcher import stop_with_launcher
    from mgcc_dist.common.log import configure_logging  # which imports this module

    _collect_garbage_less_often()
    stop_with_launcher()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda _, frame: _interrupt(program, frame))
    try:
        if problem := wrong_variable():
            raise UserError(problem)
        configure_logging()
        main()
        sys.stdout.flush()
    except UserError as error:
        _exit(program, str(error), only_rank_0=isinstance(error, SharedError))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _exit(program, f"{error.name} is not installed. Run `pip install 'mgcc-dist[{EXTRAS[error.name]}]'`.")
    except KeyboardInterrupt:  # training has handlers of its own, which save first
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # as in `mgcc sweep FILE | head`, where nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _explain_system_error(program, error)
        raise


def _collect_garbage_less_often() -> None:
    """Save the third of a short program's time that Python spends on full collections.

    Importing torch creates most of a million objects. All of them are visited whenever there are a quarter more, and
    again at exit. Young objects are collected as usual.
    """
    gc.set_threshold(*gc.get_threshold()[:2], 100)
    atexit.register(gc.freeze)


def _interrupt(program: str, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; in an import, where C extensions may swallow it and stay half loaded, end at once."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{program}: interrupted\n".encode())
            os._exit(EXIT_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _explain_system_error(program: str, error: Exception) -> None:
    """Exit with one line if the user can do something about what the system, or another rank, did; else do nothing."""
    if message := system_error(error):
        _exit(program, message)
    if is_lost_connection(error):
        code = reported_exit_code()
        if code is None:
            logging.getLogger(__name__).debug("lost the connection to another rank", exc_info=True)
            _blame_another_rank(program, "has ended (see its error; if there is none, it was killed)")
        sys.exit(1 if code is None else code)
    if is_timeout(error):
        _blame_another_rank(program, "did not answer in time (the log names it)")
        sys.exit(1)


def _blame_another_rank(program: str, what: str) -> None:
    print(f"{program} [rank {rank()}]: another rank {what}. Rerun the same command to resume.", file=sys.stderr)


def system_error(error: Exception) -> str:
    """Return what a full disk, or a file that the system refuses, means for the user; "" for any other error."""
    if isinstance(error, OSError):
        if error.errno in DISK_FULL:
            return f"{error}. What was saved so far is kept. Free some space and rerun the same command to resume."
        if error.errno in REFUSED and error.filename:
            return f"{os.fsdecode(error.filename)}: can't be read or written ({error.strerror})"
    elif (found := re.search(r"\(os error (\d+)\)", str(error))) and type(error).__name__ == "SafetensorError":
        return system_error(OSError(int(found[1]), os.strerror(int(found[1]))))
    return ""


def one_line(text: str) -> str:
    """Escape control characters, such as a newline in a file name, so that a message stays one line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)


def reason_of(error: BaseException | None) -> str:
    """Return the first 300 characters of an error's text as one line, or else its type, for the reason in a message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _exit(program: str, message: str, only_rank_0: bool = False) -> NoReturn:
    message = one_line(message)
    if claim_report(message, EXIT_USER_ERROR) and not (only_rank_0 and rank()):
        print(f"{program}{f' [rank {rank()}]' if rank() else ''}: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return " Did you mean X?" for the names in `known` that are nearest to `word`, or "" if none is near.

    A dotted name is also near its own last part: `epochs` means `loop.epochs`.
    """
    names = {name.lower(): name for name in known}
    nearest = [name for name in names if name.rpartition(".")[2] == word.lower()][:3]
    nearest = nearest or difflib.get_close_matches(word.lower(), names, n=1)
    return f" Did you mean {' or '.join(prefix + names[name] for name in nearest)}?" if nearest else ""
