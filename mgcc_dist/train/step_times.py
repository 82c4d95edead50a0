"""Where the time of training steps goes: images per second, waiting for data, slow ranks, and model FLOP utilisation.

Nothing here waits for the device or for another rank: each rank measures its own steps, and the training loop gathers
the sums together with the losses of a logged row.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from mgcc_dist.common.gpus import peak_flops
from mgcc_dist.train.flops import count_flops
from mgcc_dist.train.heartbeat import read_host
from mgcc_dist.train.schedules import Progress
from mgcc_dist.train.stragglers import describe_rank, named_ranks, slow_rank, slowest_ranks

logger = logging.getLogger(__name__)

TIMED_KEYS = ("seconds", "images_per_second", "data_seconds", "flops_per_image", "mfu", "stragglers")
"""of the rows of metrics.jsonl: they may differ between two runs that are equal otherwise"""
COUNTED_BATCH = 20
"""the FLOPs are counted then: it takes a second or more, and the utilisation of a warm-up says nothing"""
Moment = float | torch.cuda.Event
"""of the host's clock on a CPU; on a GPU, where the host runs ahead, of the device's"""


class StepTimes:
    """Times of the steps since the last logged row, in a `with` block around the training loop.

    Args:
        name: of the task, for log lines.
        module: the task's module, before it is wrapped. Its own forward pass is timed, without the collectives of DDP.
        template: its `meta_copy`.
        images: images per batch of one rank.
        accumulation: batches per step of one rank.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        module: nn.Module,
        template: nn.Module,
        images: int,
        accumulation: int,
        tf32: bool,
        accelerator: Accelerator,
    ) -> None:
        self._name, self._folder, self._template = name, folder, template
        self._images, self._accumulation = images, accumulation
        self._ranks, self._is_main = accelerator.num_processes, accelerator.is_main_process
        self._cuda = accelerator.device.type == "cuda"
        gpu = torch.cuda.get_device_name(accelerator.device) if self._cuda else "cpu"
        self._peak = peak_flops(gpu, accelerator.mixed_precision, tf32)
        self._flops: int | None = None
        self._seen = 0
        self._hooks = [module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end)]
        self._forwards: list[tuple[Moment, Moment]] = []
        self._began: Moment = 0.0
        self._totals = [(0.0, 0.0)] * self._ranks
        self._steps = 0.0
        self._hosts: dict[int, str] = {}
        self._previous: int | None = None
        self._warned: set[int] = set()
        self._reset()

    def __enter__(self) -> "StepTimes":
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._is_main and self._ranks > 1 and self._steps:
            per_step = [[seconds / self._steps for seconds in total] for total in self._totals]
            found = self._with_hosts(slowest_ranks(per_step, 0.0))
            if slowest := named_ranks(found):
                ranks = "; ".join(describe_rank(rank, found["median_seconds"]) for rank in slowest)
                logger.info("%s: slowest ranks: %s", self._name, ranks)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time the wait for the next batch."""
        began = time.perf_counter()
        yield
        self._data += time.perf_counter() - began
        self._batches += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is no training step, such as validation."""
        if self._cuda:
            torch.cuda.synchronize()  # the pause reads values from the device anyway
        began = time.perf_counter()
        yield
        self._pauses += time.perf_counter() - began

    def count_flops(self, batch: Any, progress: Progress) -> None:
        """Count the FLOPs of batch COUNTED_BATCH of this process, on the main process."""
        self._seen += 1
        if self._is_main and self._seen == COUNTED_BATCH:
            with self.paused():
                self._flops = count_flops(self._template, batch, progress)

    def per_step(self) -> list[float]:
        """Return this rank's seconds per step since the last row: waiting for data, forward pass."""
        self._forward += sum(map(_seconds_between, self._forwards))
        self._forwards = []
        steps = self._batches / self._accumulation
        return [self._data / steps, self._forward / steps]

    def row(self, by_rank: list[list[float]]) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the values of a logged row, and its `stragglers`; then begin with the next one.

        Args:
            by_rank: `per_step` of all ranks.
        """
        steps = self._batches / self._accumulation
        seconds = time.perf_counter() - self._start - self._pauses
        images = self._batches * self._images * self._ranks / seconds
        waited = sum(data for data, _ in by_rank) / self._ranks
        values = {"images_per_second": round(images, 3), "data_seconds": round(waited, 6)}
        if self._flops:
            values["flops_per_image"] = self._flops / self._images
            if self._peak:
                values["mfu"] = values["flops_per_image"] * images / (self._peak * self._ranks)
        stragglers: dict[str, Any] = {}
        if self._ranks > 1 and self._is_main:
            totals = zip(self._totals, by_rank, strict=True)
            self._totals = [(a + data * steps, b + forward * steps) for (a, b), (data, forward) in totals]
            self._steps += steps
            found = self._with_hosts(slowest_ranks(by_rank, seconds / steps))
            self._warn(found)
            stragglers = {"stragglers": found}
        self._reset()
        return values, stragglers

    def _reset(self) -> None:
        self._data = self._forward = self._pauses = 0.0
        self._batches = 0
        self._start = time.perf_counter()

    def _begin(self, module: nn.Module, _: Any) -> None:
        if module.training:
            self._began = self._moment()

    def _end(self, module: nn.Module, _: Any, __: Any) -> None:
        if not module.training:
            return
        self._forwards.append((self._began, self._moment()))
        while self._forwards and _is_over(self._forwards[0][1]):
            self._forward += _seconds_between(self._forwards.pop(0))

    def _moment(self) -> Moment:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _with_hosts(self, stragglers: dict[str, Any]) -> dict[str, Any]:
        for each in stragglers["slowest"]:
            rank = each["rank"]
            if rank not in self._hosts:
                self._hosts[rank] = read_host(self._folder, rank)
            each["host"] = self._hosts[rank]
        return stragglers

    def _warn(self, stragglers: dict[str, Any]) -> None:
        """Warn, once, of a rank that is slow in two rows in a row."""
        slow = slow_rank(stragglers)
        rank = slow["rank"] if slow else None
        if slow and rank == self._previous and rank not in self._warned:
            self._warned.add(slow["rank"])
            text = describe_rank(slow, stragglers["median_seconds"])
            logger.warning("%s: %s. The other ranks wait for it.", self._name, text)
        self._previous = rank


def _is_over(moment: Moment) -> bool:
    return isinstance(moment, float) or moment.query()


def _seconds_between(moments: tuple[Moment, Moment]) -> float:
    begin, end = moments
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
