"""Launch table of the ConvMixer kernels.

A channel with few enough elements stays in registers; a larger one is processed in groups of images of TILE_ELEMENTS
elements. Each 512 elements of a tile get one warp, with at least 4 and at most 8 warps. This is a table and not an
autotuner, so that the order of every sum, and therefore every bit of the result, depends only on the shape and the kind
of GPU.
"""

from typing import NamedTuple

from torch import Tensor

PLANE_SIZES = (16, 32)
"""supported plane heights and widths: one or two tensor-core tiles"""
TILE_ELEMENTS = 2048
FORWARD_RESIDENT = 8192
"""maximum elements per channel that `forward_resident` keeps in registers"""
BACKWARD_RESIDENT = 2048
"""maximum elements per channel that `backward_resident` keeps in registers"""


class LaunchPlan(NamedTuple):
    images_per_tile: int
    """a power of two"""
    resident: bool
    """whether one tile holds the complete batch"""
    num_warps: int


def plan_launch(batch: int, height: int, width: int, resident: int) -> LaunchPlan:
    """Return the launch of a kernel with one program per channel that can keep `resident` elements in registers."""
    plane = height * width
    images = 1 << (batch - 1).bit_length()
    fits = images * plane <= resident
    if not fits:
        images = max(TILE_ELEMENTS // plane, 1)
    return LaunchPlan(images, fits, min(max(images * plane // 512, 4), 8))


def cbhw_shape(tensor: Tensor, is_cbhw: bool) -> tuple[int, int, int, int]:
    """Return C, B, H, W of a [C,B,H,W] tensor (`is_cbhw`) or a [B,C,H,W] tensor."""
    first, second, height, width = tensor.shape
    return (first, second, height, width) if is_cbhw else (second, first, height, width)


STAGED_MAX_REGISTERS = {"sm_80": 128, "sm_86": 128, "sm_89": 128, "sm_120": 168}
"""maxnreg, for four or three programs per multiprocessor; by default ptxas uses 96 registers, for five, and spills"""


def forward_options(launch: LaunchPlan, target: str) -> dict[str, int]:
    """Return num_warps, num_stages and, where ptxas would spill, maxnreg."""
    options = {"num_warps": launch.num_warps, "num_stages": 2}
    if not launch.resident and target in STAGED_MAX_REGISTERS:
        options["maxnreg"] = STAGED_MAX_REGISTERS[target]
    return options


class BackwardPlan(NamedTuple):
    images_per_tile: int
    resident: bool
    options: dict[str, int]
    stages: tuple[tuple[int, int], ...]
    """FIRST_STAGE and LAST_STAGE of each launch of the staged kernel"""


def plan_backward(batch: int, height: int, width: int, resident: int, pre_norm: bool, target: str) -> BackwardPlan:
    """Return the launch like `plan_launch`, with the compiler options that keep the staged kernel from spilling."""
    images, fits, num_warps = plan_launch(batch, height, width, resident)
    if fits:
        return BackwardPlan(images, True, {"num_warps": num_warps, "num_stages": 2}, ())
    if target == "gfx942":
        # Masks and pointers fill the scalar registers: no pipelining, fewer rows, one launch per stage.
        images = max(images * min(PLANE_SIZES) // width, 1)
        stages = tuple((stage, stage) for stage in range(3 if pre_norm else 2))
        return BackwardPlan(images, False, {"num_warps": width // 4, "num_stages": 1}, stages)
    # Without maxnreg, ptxas limits itself to 168 registers, for three programs per multiprocessor, and spills.
    return BackwardPlan(images, False, {"num_warps": num_warps, "num_stages": 2, "maxnreg": 255}, ((0, 2),))


def pointwise_tiles(channels: int, columns: int, element_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the block sizes and options of the pointwise kernel of the evaluation."""
    large = columns * channels >= 128 * 128 * 100  # enough tiles to occupy a hundred multiprocessors
    tile = 128 if large else 64
    blocks = {"BM": tile, "BN": tile, "BK": 64 if element_size == 2 else 32}
    return blocks, {"num_warps": 8 if large else 4, "num_stages": 3}
