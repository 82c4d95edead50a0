"""Launch configuration of the ConvMixer kernels, and BatchNorm statistics across ranks.

**Launch table.** A channel with few enough elements stays in registers; a larger one is processed in groups of images
of TILE_ELEMENTS elements. Each 512 elements of a tile get one warp, with at least 4 and at most 8 warps. This is a
table and not an autotuner, so that the order of every sum, and therefore every bit of the result, depends only on the
shape and the kind of GPU.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from mgcc_dist.kernels.compile_spec import CompileSpec

PLANE_SIZES = (16, 32)
"""supported plane heights and widths: one or two tensor-core tiles"""
TILE_ELEMENTS = 2048


class LaunchPlan(NamedTuple):
    images_per_tile: int
    """a power of two"""
    resident: bool
    """whether one tile holds the complete batch"""
    num_warps: int


def plan_launch(batch: int, height: int, width: int, resident: int) -> LaunchPlan:
    """Return the launch of a kernel with one program per channel that can keep `resident` elements in registers."""
    plane = height * width
    images = triton.next_power_of_2(batch)
    fits = images * plane <= resident
    if not fits:
        images = max(TILE_ELEMENTS // plane, 1)
    return LaunchPlan(images, fits, min(max(images * plane // 512, 4), 8))


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums and statistics: fp32, or fp64 for fp64 inputs (in tests)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cbhw_shape(tensor: Tensor, is_cbhw: bool) -> tuple[int, int, int, int]:
    """Return C, B, H, W of a [C,B,H,W] tensor (`is_cbhw`) or a [B,C,H,W] tensor."""
    first, second, height, width = tensor.shape
    return (first, second, height, width) if is_cbhw else (second, first, height, width)


# BatchNorm statistics across ranks.


def merge_statistics(counts: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Merge the statistics of R sets of values: counts [R,1], means [R,C] and biased variances [R,C].

    Returns [3,C]: mean, biased variance, unbiased variance. The variance is the variance within the sets plus that of
    their means, without a difference of large squares.
    """
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    squares = (counts * (variances + (means - mean).square())).sum(0)
    return torch.stack([mean, squares / total, squares / (total - 1)])


def gather_statistics(stats: Tensor, count: int, group: str) -> None:
    """Replace this rank's stats [3,C], over `count` values per channel, by the statistics of the group."""
    process_group = _resolve(group)
    local = torch.cat([stats[:2].flatten(), stats.new_tensor([count])])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, local, group=process_group)
    all_ranks = torch.stack(gathered)
    means, variances = all_ranks[:, :-1].unflatten(1, (2, -1)).unbind(1)
    stats.copy_(merge_statistics(all_ranks[:, -1:], means, variances))


def average_sums(sums: Tensor, count: int, group: str) -> None:
    """Replace this rank's sums [2,C], over `count` values per channel, by their mean over all values of the group."""
    all_ranks = torch.cat([sums.flatten(), sums.new_tensor([count])])
    dist.all_reduce(all_ranks, group=_resolve(group))
    sums.copy_((all_ranks[:-1] / all_ranks[-1]).view_as(sums))


def _resolve(group: Any) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)


# Ahead-of-time compile specs.

BF16_TENSORS = frozenset({"z_ptr", "x_ptr", "y_ptr", "dy_ptr", "dtap_ptr", "g_ptr", "dz_ptr", "dx_ptr", "gradient_ptr"})
SPEC_SHAPES = ((16, 8, 7), (16, 64, 7), (32, 8, 7))
"""plane size, batch size, depthwise kernel size"""
SPEC_LARGE_KERNEL = (16, 8, 13)


def make_compile_spec(
    name: str,
    kernel: Any,
    batch: int,
    constants: dict[str, Any],
    options: dict[str, int],
    *,
    bf16_tensors: frozenset[str] = BF16_TENSORS,
    tensor_cores: bool = True,
) -> CompileSpec:
    """Build a spec with 1024 channels: `bf16_tensors` are bf16 pointers, all other tensors fp32."""
    tensors = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
    values = {"C": 1024, "B": batch, "N": 256 * batch, "count": 256.0 * batch, "eps": 1e-5, "pre_eps": 1e-5}
    return CompileSpec(
        f"convmixer.{name}",
        kernel,
        {argument: "*bf16" if argument in bf16_tensors else "*fp32" for argument in tensors},
        {argument: value for argument, value in values.items() if argument in kernel.arg_names},
        constants,
        options,
        tensor_cores,
    )
