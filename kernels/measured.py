"""The table of benchmark results, measured.json: where a fused implementation is at least as fast as the plain module.

`mgcc bench --write-table` writes the table and `fuse(model, "auto")` reads it. Each row is one implementation of one
operation on one device, with `mode` (training includes forward and backward), the input's `dtype`, `layout`, `shape`
and `batch`, and

    speedup   time of the plain module in its faster layout / time of the implementation, measured in alternation on
              the same machine: the value that four rounds of five reach. On a GPU by the replay of CUDA graphs on cold
              inputs, because a training step that keeps the GPU busy hides the launches of its kernels

A GPU is identified by its name. A CPU is identified by architecture and vector instructions only, so its rows apply to
all processors with these instructions: a speedup carries over between them, a time does not. `devices` records when,
where and under which load the rows of a device were measured.
"""

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .autocast import compute_dtype

CPU = f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

KEY_FIELDS = ("op", "implementation", "mode", "dtype", "layout", "shape")
RowKey = tuple[str, str, str, str, str, tuple[int, ...]]
"""the values of KEY_FIELDS"""
Table = dict[str, dict[RowKey, float]]
"""device -> row key -> speedup"""


def read_table(path: Path) -> Table:
    """Read `path`. Rows that differ only in batch size are merged; the lowest speedup counts."""
    table: Table = {}
    for row in read_rows(path):
        device_rows, key = table.setdefault(row["device"], {}), row_key(row)
        device_rows[key] = min(row["speedup"], device_rows.get(key, row["speedup"]))
    return table


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of `path` as they are; no rows if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def row_key(row: dict[str, Any]) -> RowKey:
    """Return the fields that `fuse` looks a row up by."""
    op, implementation, mode, dtype, layout, shape = (row[name] for name in KEY_FIELDS)
    return op, implementation, mode, dtype, layout, tuple(shape)


def device_name(device: torch.device) -> str:
    """Return the device's name in the table: the GPU's name, or the CPU's vector instructions."""
    return _gpu_name(device) if device.type == "cuda" else CPU if device.type == "cpu" else device.type


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


# Dynamo cannot trace the CUDA call and would break the graph. torch.compiler.assume_constant_result does the same, but
# imports Dynamo, which takes two seconds.
_gpu_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def mode_name(module: nn.Module) -> str:
    """Return "training" or "evaluation"; evaluation with gradients enabled counts as training."""
    return "training" if module.training or torch.is_grad_enabled() else "evaluation"


def dtype_name(x: Tensor) -> str:
    """Return the dtype that convolutions of x compute in, such as "bfloat16"."""
    return str(compute_dtype(x)).removeprefix("torch.")


def layout_name(x: Tensor) -> str:
    """Return "channels_last" or "contiguous"."""
    return "channels_last" if x.is_contiguous(memory_format=torch.channels_last) else "contiguous"
