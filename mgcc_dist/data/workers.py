"""Worker processes that load batches ahead, in order, and that die when the main process wants them to, not before."""

import atexit
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from mgcc_dist.common.errors import UserError

Loaded = TypeVar("Loaded")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def load_in_order(load: Callable[[int], Loaded], numbers: Iterable[int], workers: int) -> Generator[Loaded, None, None]:
    """Yield `load(n)` for each of `numbers`, in their order, computed by `workers` processes (0: by this one).

    Workers ignore SIGINT, SIGTERM and SIGUSR2: a signal that is sent to a whole process group stops the main process
    when it has saved itself. They use one thread each, and end when the iterator is closed or dropped, and at exit.
    Tensors arrive in pinned memory where there is a CUDA device. The global random generators are left alone.

    Raises:
        UserError: raised by `load`, with the text it had there.
    """
    if workers == 0:
        yield from map(load, numbers)
        return
    loader = DataLoader(
        _Loads(load),
        sampler=numbers,
        batch_size=None,  # an item is a whole batch
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the workers' seed is drawn from the global one
    )
    with _signals_held_back():
        iterator = iter(loader)
    stop = iterator._shutdown_workers  # type: ignore[attr-defined] # public: only by dropping the last reference
    # At exit multiprocessing joins workers that are left over, which would wait for ever: they ignore its SIGTERM.
    atexit.register(stop)
    try:
        for loaded in iterator:
            if isinstance(loaded, UserError):
                raise loaded
            yield loaded
    finally:
        atexit.unregister(stop)
        stop()


class _Loads(Dataset, Generic[Loaded]):
    """`load` as a data set whose items are what it returns, or the UserError that it raised."""

    def __init__(self, load: Callable[[int], Loaded]) -> None:
        self.load = load

    def __getitem__(self, number: int) -> Loaded | UserError:
        try:
            return self.load(number)
        except UserError as error:
            return UserError(str(error))  # a subclass may not survive pickling


def _ignore_signals(_worker: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Workers started meanwhile are born deaf to the signals; this process hears of them at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
