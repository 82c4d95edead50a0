"""Profile a few steps of a run with torch.profiler: `--loop.profile 20` traces the steps 20 to 24 on rank 0."""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from mgcc_dist.common.files import create_folder, replacing, write_text

logger = logging.getLogger(__name__)

STEPS = 5
FOLDER = "profile"
ROWS = 40
"""operations in the table"""
DEPTH = 3
"""of the modules that are named in the trace: networks, their decoders, and what these consist of"""


class StepProfiler:
    """Profiles STEPS steps from step `first` on, the first step of a run being 1. With `first` None, does nothing.

    Writes to `profile/` in the run folder: `step_N.json.gz`, a trace for https://ui.perfetto.dev or chrome://tracing in
    which forward passes of modules are named; `step_N.txt`, a table of the operations; and on a GPU
    `step_N_memory.pickle`, a snapshot of its memory for https://docs.pytorch.org/memory_viz.
    On a GPU the same modules are also NVTX ranges, for Nsight Systems.

    Args:
        name_modules: mark forward passes of modules. Hooks would break the graphs of torch.compile.
    """

    def __init__(
        self, first: int | None, folder: Path, module: nn.Module, accelerator: Accelerator, name_modules: bool
    ) -> None:
        self._first = first if accelerator.is_main_process else None
        self._folder, self._module, self._name_modules = folder / FOLDER, module, name_modules
        self._device = accelerator.device
        self._profiler: profile | None = None
        self._hooks: list[Any] = []

    def before_step(self, step: int) -> None:
        """Start to record if `step` is the first one to profile."""
        if step != self._first:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        if self._name_modules:
            self._hooks = _name_forward_passes(self._module, nvtx=self._device.type == "cuda")
        self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profiler.start()

    def after_step(self, step: int, last: bool) -> None:
        """Write the files if `step` is the last one to profile, or of the run."""
        if self._profiler is None or self._first is None:
            return
        if step < self._first + STEPS - 1 and not last:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._profiler.stop()
        for hook in self._hooks:
            hook.remove()
        create_folder(self._folder)
        path = self._folder / f"step_{self._first}.json.gz"
        with replacing(path) as scratch:  # the suffix decides whether it is compressed
            trace = scratch.with_name(f"{scratch.name}.json.gz")
            self._profiler.export_chrome_trace(str(trace))
            trace.rename(scratch)
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = self._profiler.key_averages().table(sort_by=order, row_limit=ROWS)
        write_text(self._folder / f"step_{self._first}.txt", table)
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / f"step_{self._first}_memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profiler, self._hooks = None, []
        logger.info("profile: steps %d to %d -> %s", self._first, step, path)


def _name_forward_passes(module: nn.Module, nvtx: bool) -> list[Any]:
    """Mark the forward pass of each submodule, down to DEPTH, with its name; return the handles of the hooks.

    Args:
        nvtx: also as an NVTX range, which needs a GPU.
    """
    hooks = []
    for name, part in module.named_modules():
        if not name or name.count(".") >= DEPTH:
            continue
        open_ranges: list[record_function] = []

        def begin(_: nn.Module, __: Any, label: str = name, ranges: list[record_function] = open_ranges) -> None:
            ranges.append(record_function(label))
            ranges[-1].__enter__()
            if nvtx:
                torch.cuda.nvtx.range_push(label)

        def end(_: nn.Module, __: Any, ___: Any, ranges: list[record_function] = open_ranges) -> None:
            if nvtx:
                torch.cuda.nvtx.range_pop()
            ranges.pop().__exit__(None, None, None)

        hooks += [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
    return hooks
