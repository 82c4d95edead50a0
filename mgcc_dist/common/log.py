"""Logging of the programs: lines with time, rank and level on stderr, written above a progress bar if there is one.

    2026-11-27 12:03:44 [rank 0] INFO segment: 300 steps -> out/runs/mgcc_1

Modules log with `logging.getLogger(__name__)`, programs with `logging.getLogger("mgcc_dist.NAME")`. The main process
shows INFO and above, other ranks WARNING and above. Results that a user may pipe, such as tables, are printed to stdout
instead.
"""

import copy
import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

from mgcc_dist.common.errors import UserError, one_line
from mgcc_dist.common.rank_errors import rank

LEVELS = ("debug", "info", "warning", "error")
VARIABLE = "MGCC_LOG_LEVEL"
FORMAT = "%(asctime)s [rank %(rank)d] %(levelname)s %(message)s"
PACKAGE = logging.getLogger("mgcc_dist")


def configure_logging(level: str | None = None) -> None:
    """Send the package's log lines to stderr. May be called again to change the level.

    Args:
        level: one of LEVELS; None: that of the environment variable MGCC_LOG_LEVEL, else `info`. `debug` also shows
            all lines of the other ranks.

    Raises:
        UserError: `level` or MGCC_LOG_LEVEL is not one of LEVELS.
    """
    source = "--log-level" if level else VARIABLE
    level = (level or os.environ.get(VARIABLE) or "info").lower()
    if level not in LEVELS:
        raise UserError(f"{source}: {level!r} is not a log level. Use one of {', '.join(LEVELS)}.")
    for handler in [each for each in PACKAGE.handlers if isinstance(each, _StderrHandler)]:
        PACKAGE.removeHandler(handler)
    PACKAGE.addHandler(_StderrHandler())
    PACKAGE.setLevel(level.upper())
    PACKAGE.propagate = False


class _StderrHandler(logging.Handler):
    """Writes above a progress bar if there is one; drops INFO lines of ranks other than 0."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT, "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        here = rank()  # asked at each line: under Slurm it is known only once the process has joined its group
        if here and record.levelno < logging.WARNING and PACKAGE.level > logging.DEBUG:
            return
        try:
            shown = copy.copy(record)
            vars(shown)["rank"] = here
            if isinstance(record.args, tuple):  # file names, say
                shown.args = tuple(one_line(str(arg)) if isinstance(arg, (str, Path)) else arg for arg in record.args)
            tqdm.write(self.format(shown), file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)
