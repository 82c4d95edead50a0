"""A process saves and exits when its launcher ends."""

import signal
import time

import psutil
import pytest
from ranks import accelerate, start, torchrun

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from mgcc_dist.common.errors import run_program

folder = Path(sys.argv[1])

def save(*_):
    (folder / f"saved-{os.getpid()}").touch()
    sys.exit(75)

def main():
    signal.signal(signal.SIGTERM, save)
    (folder / f"started-{os.getpid()}").touch()
    time.sleep(600)

run_program("test", main)
"""


@pytest.mark.parametrize(
    ("launcher", "ranks", "number"),
    [
        (accelerate("--cpu", "--num_processes", "1"), 1, signal.SIGTERM),
        (accelerate("--cpu", "--num_processes", "1"), 1, signal.SIGKILL),
        (torchrun(2), 2, signal.SIGKILL),
    ],
    ids=["accelerate-SIGTERM", "accelerate-SIGKILL", "torchrun-SIGKILL"],
)
def test_every_rank_saves_when_its_launcher_is_killed(tmp_path, launcher, ranks, number):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    process = start(launcher, [script, tmp_path])

    def wait_for(state):
        deadline = time.monotonic() + 300
        while len(found := sorted(tmp_path.glob(f"{state}-*"))) < ranks:
            assert time.monotonic() < deadline, f"only {found}"
            time.sleep(0.1)
        return {int(path.name.partition("-")[2]) for path in found}

    try:
        started = wait_for("started")
        process.send_signal(number)
        assert wait_for("saved") == started
    finally:
        for pid in [process.pid, *(int(path.name.partition("-")[2]) for path in tmp_path.glob("started-*"))]:
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()
        process.wait()
