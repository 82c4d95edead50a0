"""Start programs on real ranks, with gloo and one thread each: by torchrun or `accelerate launch`, or forked.

`forked` is for what ranks do, the launchers for what depends on one: importing torch, Accelerate and diffusers takes
each started process 5 to 8 seconds of CPU, a fork of a process that has imported them milliseconds.
"""

import contextlib
import functools
import gc
import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[1]
DEADLINE = 600  # seconds, enough for a busy machine
PRELOADED = [
    "gc_disabled",
    *("diffusers.schedulers", "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d"),
    *("diffusers.pipelines.latent_diffusion", "scipy.spatial", "torch.utils.tensorboard", "matplotlib.figure"),
    *("mgcc_dist.assessment.stages", "mgcc_dist.diffusion.stages", "mgcc_dist.segmentation.task", "submitit"),
    "monai.losses",
]


@dataclass(frozen=True)
class forked:
    """Stands for a launcher whose ranks are forked from a process that has imported all libraries."""

    ranks: int
    folder: Path = REPOSITORY
    """current folder of the ranks"""


Launcher = Sequence[str] | forked


def torchrun(ranks: int) -> list[str]:
    """Return the words that start torchrun on a free port; none for one rank."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []


def accelerate(*options: str) -> list[str]:
    return ["-m", "accelerate.commands.launch", "--main_process_port", "0", *options]


def start(launcher: Launcher, words: Sequence[str], **variables: str) -> "Started":
    """Start `words` (a script, or `-m` and a module, and arguments) under `launcher` with these environment variables.

    The process imports from the same paths as this one, and sees no GPU.
    """
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    fixed["PYTHONPATH"] = os.pathsep.join(sys.path)
    if isinstance(launcher, forked):
        return ForkedRanks(launcher, [str(word) for word in words], os.environ | fixed | variables)
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, words)],
        cwd=REPOSITORY,  # paths in the files of launch/ are relative to it
        env=os.environ | fixed | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(launcher: Launcher, words: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the same to its end, whatever its exit code. Kill all of its processes at the deadline."""
    process = start(launcher, words, **variables)
    try:
        output, errors = process.communicate(timeout=DEADLINE)
    except BaseException:  # the ranks survive a launcher that is killed
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def finish(launcher: Launcher, words: Sequence[str], **variables: str) -> str:
    """Run the same, which must succeed, and return what it printed to stdout."""
    return _checked(run(launcher, words, **variables)).stdout


def finish_log(launcher: Launcher, words: Sequence[str], **variables: str) -> str:
    """Run the same, which must succeed, and return its log."""
    return _checked(run(launcher, words, **variables)).stderr


def _checked(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


class ForkedRanks:
    """The forked processes of a program, with the interface of a launcher's Popen; a signal goes to each of them."""

    def __init__(self, launcher: forked, words: list[str], environment: dict[str, str]) -> None:
        self.args, ranks = words, launcher.ranks
        self._files = [Path(tempfile.mkstemp(prefix=f"rank-{kind}-")[1]) for kind in ("stdout", "stderr")]
        self._store = None
        grouped = ranks > 1 or "ACCELERATE_USE_DEEPSPEED" in environment
        if grouped:
            from torch.distributed import TCPStore

            # Hosted here, as by torchrun's agent, so that the port is free.
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment = environment | {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
            }
        self.processes = []
        for rank in range(ranks):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if grouped else {}
            arguments = (words, launcher.folder, environment | numbers, *self._files)
            self.processes.append(fork_server().Process(target=_run_rank, args=arguments))
            self.processes[-1].start()

    @property
    def pid(self) -> int:
        """The process of the first rank."""
        return self.processes[0].pid

    @property
    def returncode(self) -> int | None:
        """The first exit code that is not 0; None while a rank is running."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        end = time.monotonic() + (timeout or DEADLINE)
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        self._store = None
        texts = [file.read_text(errors="replace") for file in self._files]
        for file in self._files:
            file.unlink()
        return texts[0], texts[1]


Started = subprocess.Popen | ForkedRanks


@functools.cache
def fork_server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    optional = [name for name in ("deepspeed",) if importlib.util.find_spec(name)]
    context.set_forkserver_preload([*PRELOADED, *optional])
    return context


def start_fork_server() -> None:
    """Fork the fork server from this process, which has imported most of the libraries, instead of starting Python.

    Call it before tests run, which start threads: a fork has only the thread that forks.
    """
    fork_server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing.util, "spawnv_passfds", _fork)
        multiprocessing.forkserver.ensure_running()


def _fork(path: str, arguments: Sequence[str], kept: Sequence[int]) -> int:
    """Do what `spawnv_passfds` does for `python -c TEXT` in a fork of this process."""
    if pid := os.fork():
        return pid
    multiprocessing.forkserver._forkserver._lock = threading.Lock()  # the caller holds it: ranks start servers, too
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for file in [int(link.name) for link in Path("/proc/self/fd").iterdir()]:
            if file not in (0, 1, 2, null, *kept):  # such as pytest-xdist's, whose ends the other side waits for
                with contextlib.suppress(OSError):  # that of the folder itself
                    os.dup2(null, file)
        exec(arguments[-1])
    finally:
        os._exit(1)


def _run_rank(words: list[str], folder: Path, environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    """Do in this forked process what `python WORDS` does in a new one."""
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # of DataLoader workers: it was inherited
    gc.freeze()  # otherwise each collection would touch, and so copy, the memory that was forked
    gc.enable()
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if "ACCELERATE_USE_DEEPSPEED" in environment:
        import deepspeed

        # DeepSpeed then uses gloo. Its collectives in shared memory would first be compiled, for half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with contextlib.suppress(KeyboardInterrupt):
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, str(folder))
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
