"""The measured table, measured.json: where a fused form was at least as fast as the plain module.

`bench --write-table` writes it, `fuse(model, "auto")` reads it. A row is one form of one operation on one device, with
`mode` (training counts forward and backward together), `dtype`, `layout` and `shape` of the input, `batch`, and

    ratio   time of the plain module in its faster layout / time of the form, measured in turns on one machine: what was
            reached or passed in four rounds of five, and by the clock that favours the form least

and no times. A GPU is known by its name. A CPU is known by architecture and vector instructions alone, so its rows are
taken to hold for other processors with these instructions: there a ratio of two forms in one library carries over, as
a time would not. `devices` says when, on what and how busy a machine the rows of a device were measured.
"""

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgcc_dist.kernels.autocast import computing_dtype

TABLE = Path(__file__).parent / "measured.json"
CPU = f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

KEY = ("op", "form", "mode", "dtype", "layout", "shape")
Row = tuple[str, str, str, str, str, tuple[int, ...]]
"""the values of KEY"""
Table = dict[str, dict[Row, float]]
"""device -> row -> ratio"""


def read_table(path: Path) -> Table:
    """The rows of `path`; of rows that differ in the batch alone the least ratio counts."""
    table: Table = {}
    for row in read_rows(path):
        of_device, key = table.setdefault(row["device"], {}), key_of(row)
        of_device[key] = min(row["ratio"], of_device.get(key, row["ratio"]))
    return table


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def key_of(row: dict[str, Any]) -> Row:
    op, form, mode, dtype, layout, shape = (row[name] for name in KEY)
    return op, form, mode, dtype, layout, tuple(shape)


def device_name(device: torch.device) -> str:
    """As the table names it: a GPU by its name, a CPU by its vector instructions."""
    return _gpu_name(device) if device.type == "cuda" else CPU if device.type == "cpu" else device.type


@torch.compiler.assume_constant_result  # Dynamo can't trace the CUDA call and would break the graph
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def mode_of(module: nn.Module) -> str:
    return "training" if module.training or torch.is_grad_enabled() else "evaluation"


def dtype_of(x: Tensor) -> str:
    """What convolutions of x compute in, such as "bfloat16"."""
    return str(computing_dtype(x)).removeprefix("torch.")


def layout_of(x: Tensor) -> str:
    return "channels_last" if x.is_contiguous(memory_format=torch.channels_last) else "contiguous"


def shape_of(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """C, H, W of the input and what else the time depends on.

    upconv: the output's channels. convmixer: the kernel's size. mixer: the kernel's size and the number of layers.
    """
    own: Any = module
    sizes = tuple(x.shape[1:])
    if "conv" in own._modules:
        return (*sizes, own.conv.out_channels)
    if "depthwise" in own._modules:
        return (*sizes, own.depthwise.kernel_size[0])
    if "0" in own._modules:
        return (*sizes, own._modules["0"].depthwise.kernel_size[0], len(own._modules))
    return sizes
