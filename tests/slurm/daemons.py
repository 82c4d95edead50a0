"""Stop and start the daemons of the testbed."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from jobs import slurm, until

PATH = f"{os.environ['PATH']}:/usr/sbin"


def process_of(state: Path, daemon: str) -> psutil.Process:
    """Return the process of `slurmctld`, `slurmdbd`, `slurmd-n1`, ..."""
    return psutil.Process(int((state / "pid" / daemon).read_text()))


@contextmanager
def stopped(state: Path, daemon: str, kill: bool = False) -> Iterator[None]:
    """Stop a daemon, and start it again at the end. With `kill` it has no chance to tell the others."""
    process = process_of(state, daemon)
    process.kill() if kill else process.terminate()
    process.wait(60)
    try:
        yield
    finally:
        name, _, node = daemon.partition("-")
        subprocess.run([name, *(["-N", node] if node else [])], check=True, env=os.environ | {"PATH": PATH})
        if name == "slurmctld":
            until(lambda: "is UP" in slurm("scontrol", "ping"))
