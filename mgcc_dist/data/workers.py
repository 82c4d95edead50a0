"""Worker processes that prefetch batches in order and stop only when the main process stops them."""

import atexit
import os
import signal
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.launcher import stop_with_parent

Loaded = TypeVar("Loaded")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def load_in_order(load: Callable[[int], Loaded], indices: Iterable[int], workers: int) -> Generator[Loaded, None, None]:
    """Yield `load(index)` for each of `indices`, in order, computed by `workers` processes (0: in this process).

    Workers ignore SIGINT, SIGTERM and SIGUSR2, so that a signal to the process group lets the main process save its
    state before it stops them. They use one thread each, and stop when the generator is closed or dropped, and at exit;
    on Linux also when the main process is killed.
    Tensors arrive in pinned memory if there is a CUDA device. The global random generators are not used.

    Raises:
        UserError: raised by `load`, with the same message.
    """
    if workers == 0:
        yield from map(load, indices)
        return
    with _blocked_signals(), warnings.catch_warnings():
        # Said twice wherever there are fewer cores than workers. Workers also wait for disks and networks.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(
            _FunctionDataset(load),
            sampler=indices,
            batch_size=None,  # each item is a complete batch
            num_workers=workers,
            worker_init_fn=partial(_start_worker, os.getpid()),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise the workers' seed would be drawn from the global generator
        )
        iterator = iter(loader)
    stop = iterator._shutdown_workers  # type: ignore[attr-defined] # the public way is to drop the last reference
    # At exit multiprocessing joins the remaining workers, which would block forever: they ignore its SIGTERM.
    atexit.register(stop)
    try:
        for loaded in iterator:
            if isinstance(loaded, UserError):
                raise loaded
            yield loaded
    finally:
        atexit.unregister(stop)
        stop()


class _FunctionDataset(Dataset, Generic[Loaded]):
    """Map-style dataset whose items are the results of `load`, or the UserError it raised."""

    def __init__(self, load: Callable[[int], Loaded]) -> None:
        self.load = load

    def __getitem__(self, index: int) -> Loaded | UserError:
        try:
            return self.load(index)
        except UserError as error:
            return UserError(str(error))  # a subclass may not survive pickling


def _start_worker(parent: int, _worker_id: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # DataLoader's own check is too late for a worker that waits for a reader of its results: it would wait for ever.
    stop_with_parent(parent, signal.SIGKILL)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Block the signals here, and in workers started meanwhile until they ignore them; deliver them at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
