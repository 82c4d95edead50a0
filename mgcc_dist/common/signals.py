"""Stopping on a signal: every rank hears of it, all stop after the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopSignal:
    """Remembers SIGTERM, SIGINT (Ctrl-C) and SIGUSR2 (Slurm's warning) while it is entered.

    A second SIGINT or SIGTERM has its ordinary effect, so an impatient Ctrl-C Ctrl-C still ends the process. SIGUSR2 is
    the scheduler's, which may say it again while the run saves itself.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        # A group of its own on the CPU: asking all ranks must not wait for the GPU's queue.
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def received_on_any_rank(self) -> bool:
        """Whether any rank has received a signal. Collective: all ranks call it at the same step."""
        if self._group is None:
            return self.received is not None
        flag = torch.tensor(int(self.received is not None))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number != signal.SIGUSR2:
            signal.signal(number, signal.SIG_DFL)
