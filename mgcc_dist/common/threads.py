"""CPU threads of a program: one per core, with a bounded spin time while they wait.

OpenMP reads both settings from the environment when torch is loaded, so `configure_threads` runs before torch is
imported. `mgcc_dist/__init__.py` calls it, but only in a process that runs one of the package's programs: importing the
library changes nothing.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mgcc_dist.common.launcher import launcher_words

# Iterations that a waiting thread spins before it sleeps. libgomp's default spins for milliseconds: fastest on a quiet
# machine, but next to other busy processes the spinning threads take the cores from those that compute. 30 steps of
# `segment --preset mgcc_demo` on two cores, by libgomp's default, with 3000, with OMP_WAIT_POLICY=PASSIVE: 18.2, 19.3,
# 23.0 s on a quiet machine; 48.9, 41.2, 35.9 s next to one busy process.
SPIN_COUNT = "3000"


def is_program(command: Sequence[str] | None = None) -> bool:
    """Return whether this process runs `mgcc`, `python -m mgcc_dist...`, or a task of a sweep that submitit started.

    `command` is the command line of the process; None: `sys.orig_argv`.
    """
    words = iter((sys.orig_argv if command is None else command)[1:])
    for word in words:
        if word == "-m":
            module = next(words)
            return module.partition(".")[0] == "mgcc_dist" or module == "submitit.core._submit"
        if word in ("-W", "-X"):  # options of python that have a value
            next(words)
        elif not word.startswith("-"):
            return Path(word).name == "mgcc"
    return False


def configure_threads() -> None:
    """Set the OpenMP variables of this process; without effect once torch is imported.

    - GOMP_SPINCOUNT becomes SPIN_COUNT, unless the user set GOMP_SPINCOUNT or OMP_WAIT_POLICY.
    - OMP_NUM_THREADS stays as the user set it. The 1 that launchers set by default is replaced: one process uses all
      cores that it may use, several ranks on a node divide them equally.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if os.environ.get("OMP_NUM_THREADS") == "1" and _is_launcher_default():
        del os.environ["OMP_NUM_THREADS"]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SUBMITIT_LOCAL_NTASKS") or 1)
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))


def _is_launcher_default() -> bool:
    """Return whether the parent process is a launcher whose user set neither OMP_NUM_THREADS nor its option for it."""
    words = launcher_words()
    try:
        variables = Path(f"/proc/{os.getppid()}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return False
    asked = any(word.startswith("--num_cpu_threads_per_process") for word in words)
    return bool(words) and not asked and not any(variable.startswith("OMP_NUM_THREADS=") for variable in variables)
