"""Start programs on real ranks as users do, by torchrun or `accelerate launch`: gloo, one thread each."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[1]
DEADLINE = 600  # seconds, enough for a busy machine


def torchrun(ranks: int) -> list[str]:
    """Return the words that start torchrun on a free port; none for one rank."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []


def accelerate(*options: str) -> list[str]:
    return ["-m", "accelerate.commands.launch", "--main_process_port", "0", *options]


def start(launcher: Sequence[str], words: Sequence[str], **variables: str) -> subprocess.Popen:
    """Start `words` (a script, or `-m` and a module, and arguments) under `launcher` with these environment variables.

    The process imports from the same paths as this one, and sees no GPU.
    """
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    fixed["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, words)],
        cwd=REPOSITORY,  # paths in the files of launch/ are relative to it
        env=os.environ | fixed | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(launcher: Sequence[str], words: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the same to its end, whatever its exit code. Kill all of its processes at the deadline."""
    process = start(launcher, words, **variables)
    try:
        output, errors = process.communicate(timeout=DEADLINE)
    except BaseException:  # the ranks survive a launcher that is killed
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def finish(launcher: Sequence[str], words: Sequence[str], **variables: str) -> str:
    """Run the same, which must succeed, and return what it printed to stdout."""
    return _checked(run(launcher, words, **variables)).stdout


def finish_log(launcher: Sequence[str], words: Sequence[str], **variables: str) -> str:
    """Run the same, which must succeed, and return its log."""
    return _checked(run(launcher, words, **variables)).stderr


def _checked(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done
