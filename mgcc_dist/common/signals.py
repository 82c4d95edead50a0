"""Stop on a signal: all ranks learn of it and stop after the same step."""

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopSignal:
    """Context that records SIGTERM, SIGINT (Ctrl-C) and SIGUSR2 (Slurm's warning) instead of acting on them.

    A second SIGINT or SIGTERM has its default effect, so pressing Ctrl-C twice ends the process. SIGUSR2, and SIGTERM
    in a Slurm job, come from the scheduler and may be repeated while the run saves a checkpoint: Slurm signals all
    processes of a job step, and a container's runtime forwards what it receives.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        # A separate group on the CPU: the all-reduce of the flag must not wait for the GPU's queue.
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def received_on_any_rank(self) -> bool:
        """Return whether any rank has received a signal. Collective: all ranks call it at the same step."""
        if self._group is None:
            return self.received is not None
        flag = torch.tensor(int(self.received is not None))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        is_repeatable = number == signal.SIGUSR2 or (number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ)
        if not is_repeatable:
            signal.signal(number, signal.SIG_DFL)
