"""How the kernels of a ConvMixer layer are launched: shapes, tiles, and statistics that ranks share.

**Launch table.** A channel with at most so many elements stays in registers; more goes through in groups of images of
TILE elements. There is a warp for every 512 elements of a tile, but 4 at least and 8 at most. It is a table and not an
autotuner, so that the order of every sum, and with it every bit, depends on the shape and the GPU's kind alone.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from mgcc_dist.kernels.case import Case

SIDES = (16, 32)  # of a plane: the height and width of a tensor-core tile, or of two
TILE = 2048


class Plan(NamedTuple):
    images: int
    """in a tile, a power of two"""
    resident: bool
    """whether that is the whole batch"""
    num_warps: int


def plan(batch: int, height: int, width: int, resident: int) -> Plan:
    """The launch of a kernel with a program a channel that can keep `resident` elements; deterministic in the shape."""
    plane = height * width
    images = triton.next_power_of_2(batch)
    fits = images * plane <= resident
    if not fits:
        images = max(TILE // plane, 1)
    return Plan(images, fits, min(max(images * plane // 512, 4), 8))


def accumulator_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def shape_of(tensor: Tensor, channels_outer: bool) -> tuple[int, int, int, int]:
    """C, B, H, W of a [C,B,H,W] or a [B,C,H,W] tensor."""
    first, second, height, width = tensor.shape
    return (first, second, height, width) if channels_outer else (second, first, height, width)


# Statistics across ranks.


def merge_statistics(counts: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """[3,C] mean, biased and unbiased variance of R sets of values, from their counts [R,1], means and variances [R,C].

    The variance is that within the sets plus that of their means: no difference of large squares.
    """
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    squares = (counts * (variances + (means - mean).square())).sum(0)
    return torch.stack([mean, squares / total, squares / (total - 1)])


def gather_statistics(stats: Tensor, count: int, group: str) -> None:
    """Replaces stats [3,C] of this rank's `count` values a channel by those of the group."""
    process_group = _resolve(group)
    mine = torch.cat([stats[:2].flatten(), stats.new_tensor([count])])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, mine, group=process_group)
    everyone = torch.stack(gathered)
    means, variances = everyone[:, :-1].unflatten(1, (2, -1)).unbind(1)
    stats.copy_(merge_statistics(everyone[:, -1:], means, variances))


def average_sums(sums: Tensor, count: int, group: str) -> None:
    """Replaces this rank's sums [2,C] over its `count` values by the mean over all values of the group."""
    everyone = torch.cat([sums.flatten(), sums.new_tensor([count])])
    dist.all_reduce(everyone, group=_resolve(group))
    sums.copy_((everyone[:-1] / everyone[-1]).view_as(sums))


def _resolve(group: Any) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)


# Compiled forms for the ledger.

HALVES = frozenset({"z_ptr", "x_ptr", "y_ptr", "dy_ptr", "dtap_ptr", "g_ptr", "dz_ptr", "dx_ptr", "gradient_ptr"})
SHAPES = ((16, 8, 7), (16, 64, 7), (32, 8, 7))
"""side of the planes, batch, and size of the depthwise kernel"""
WIDE = (16, 8, 13)


def make_case(
    name: str,
    kernel: Any,
    batch: int,
    constants: dict[str, Any],
    options: dict[str, int],
    *,
    halves: frozenset[str] = HALVES,
    tensor_cores: bool = True,
) -> Case:
    """Of 1024 channels, with the tensors `halves` in bf16 and the others in fp32."""
    tensors = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
    values = {"C": 1024, "B": batch, "N": 256 * batch, "count": 256.0 * batch, "eps": 1e-5, "pre_eps": 1e-5}
    return Case(
        f"convmixer.{name}",
        kernel,
        {argument: "*bf16" if argument in halves else "*fp32" for argument in tensors},
        {argument: value for argument, value in values.items() if argument in kernel.arg_names},
        constants,
        options,
        tensor_cores,
    )
