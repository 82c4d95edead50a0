"""Programs on real ranks, started as users start them, by torchrun or `accelerate launch`: gloo, one thread each."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[1]
DEADLINE = 600  # seconds, for a machine that does much else


def torchrun(ranks: int) -> list[str]:
    """The launcher that finds a free port by itself; one rank needs none."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []


def accelerate(*options: str) -> list[str]:
    return ["-m", "accelerate.commands.launch", "--main_process_port", "0", *options]


def start(launcher: Sequence[str], words: Sequence[str], **variables: str) -> subprocess.Popen:
    """Begin `words`, a script or `-m` and a module with what follows, under `launcher` with some environment variables.

    What is importable here is importable there, and no GPU is seen.
    """
    fixed = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    fixed["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, words)],
        cwd=REPOSITORY,  # to which the files of launch/ name theirs
        env=os.environ | fixed | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(launcher: Sequence[str], words: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """The same to its end, whatever its exit code; nothing of it outlives the deadline."""
    process = start(launcher, words, **variables)
    try:
        output, errors = process.communicate(timeout=DEADLINE)
    except BaseException:  # of a launcher that is killed, the ranks would live on
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def finish(launcher: Sequence[str], words: Sequence[str], **variables: str) -> str:
    """The same, which must succeed; what it printed."""
    done = run(launcher, words, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
