"""Errors that are for the user: one line that says what was wrong, where, and what to do."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input or configuration. Its text is shown as it is, without a stack trace."""


EXIT_USER_ERROR = 2


def run_program(program: str, main: Callable[[], None]) -> None:
    """Run `main`; a UserError becomes `program: message` on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" [rank {rank}]"
        print(f"{program}{where}: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
