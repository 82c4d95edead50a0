"""Device functions, block sizes and compile specs shared by the kernels of the multi-scale attention gate.

Memory layout: tensors are channels-last. Each row of memory is one pixel's C channels, so every convolution is a matrix
product whose A tile is a shifted tile of pixels. Weights are stored [out, tap, in] and read in that layout forward and
backward. A norm is a table with one row per coefficient and one column per channel:
norm(u) = (u - center) * scale + shift.
"""

# mypy: disallow-untyped-defs=False

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.compile_spec import CompileSpec
from mgcc_dist.kernels.targets import INTERPRETED


class TileConfig(NamedTuple):
    """Block sizes of a tensor-core kernel."""

    tile_h: int
    """pixel rows per tile"""
    tile_w: int
    """pixel columns per tile"""
    block_n: int
    """output channels per program"""
    block_k: int
    """reduction length per product"""
    num_warps: int
    num_stages: int

    @property
    def pixels(self) -> int:
        return self.tile_h * self.tile_w

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def power_of_two_divisor(channels: int, largest: int) -> int:
    """Return the largest power of two up to `largest` that divides `channels`."""
    return min(channels & -channels, largest)


def channel_block(channels: int, dtype: torch.dtype) -> int:
    """Return the reduction block of most products: the channels in 128 bytes of a pixel."""
    return power_of_two_divisor(channels, 128 // dtype.itemsize)


def convolution_tiles(channels: int, dtype: torch.dtype, target: str) -> TileConfig:
    """Return the blocks of the branch convolutions and the input gradient: 256 pixels x 64 channels or 128 x 128.

    Both have 64 accumulators per thread and the least L2 traffic possible with that.
    """
    out = power_of_two_divisor(channels, 128)
    rows = 8 if out == 128 else 16
    stages = 2 if target == "gfx942" and out < 128 else 3  # three need 80 KiB of its 64 KiB shared memory
    return TileConfig(rows, 16, out, channel_block(channels, dtype), num_warps=8, num_stages=stages)


def evaluation_tiles(channels: int, dtype: torch.dtype, target: str) -> TileConfig:
    """Return the blocks of the single-kernel gate.

    The accumulators of the votes [pixels, C] and of one branch [pixels, block_n] are live at the same time. With these
    values of block_k they do not spill on sm_80.
    """
    block_k = channel_block(channels, dtype) if channels == 128 else min(channels, 32)
    stages = 2 if target == "sm_120" and channels == 128 else 3  # three stages spill there
    return TileConfig(8, 16, min(channels, 64), block_k, num_warps=8, num_stages=stages)


def vote_tiles(channels: int, dtype: torch.dtype, target: str) -> TileConfig:
    """Return the blocks of the vote and its input gradient. The pixels of a tile are consecutive in memory."""
    out = power_of_two_divisor(channels, 128)
    if target == "gfx942" and out == 128:  # a larger block_k or three stages spill
        return TileConfig(1, 128, out, channel_block(channels, dtype) // 2, num_warps=8, num_stages=2)
    return TileConfig(1, 128, out, channel_block(channels, dtype), num_warps=8, num_stages=3)


def weight_tiles(channels: int, dtype: torch.dtype) -> TileConfig:
    """Return the blocks of the vote's weight gradient: tile_w of C outputs by block_n of 3C inputs."""
    block = power_of_two_divisor(channels, 128)
    return TileConfig(1, block, block, 128 // dtype.itemsize, num_warps=8, num_stages=3)


def elementwise_block(channels: int) -> tuple[int, int]:
    """Return pixels and channels per program of an elementwise kernel: 4096 elements."""
    out = power_of_two_divisor(channels, 128)
    return 4096 // out, out


def count_tiles(x: Tensor, tiles: TileConfig) -> int:
    """Return the number of tile_h x tile_w tiles over all images of x."""
    batch, _, height, width = x.shape
    return batch * triton.cdiv(height, tiles.tile_h) * triton.cdiv(width, tiles.tile_w)


def accumulator_type(dtype: torch.dtype) -> Any:
    """Return Triton's accumulator type: float32, or float64 for gradcheck in the interpreter."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and statistics: float32, or float64 for float64 inputs (in tests)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def needs_upcast(dtype: torch.dtype) -> bool:
    """Return whether products need float32 operands: the interpreter multiplies bit patterns of bfloat16.

    See triton issue 11584.
    """
    return INTERPRETED and dtype == torch.bfloat16


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def tile_and_channels(C: tl.constexpr, BN: tl.constexpr):
    """Return the program's tile and output channels. Programs that share a tile are adjacent, for L2 reuse."""
    return tl.program_id(0) // (C // BN), tl.program_id(0) % (C // BN) * BN + tl.arange(0, BN)


@triton.jit
def pixel_block(tile, pixels, BM: tl.constexpr):
    """Return the first pixel of a block, the pixel indices relative to it, and their validity mask."""
    first = tile.to(tl.int64) * BM
    row = tl.arange(0, BM)
    return first, row, row < pixels - first


@triton.jit
def tile_pixels(tile, H, W, TH: tl.constexpr, TW: tl.constexpr):
    """Return image, rows and columns of a TH x TW tile. Pixels of the last tiles can be outside the plane."""
    across = tl.cdiv(W, TW)
    down = tl.cdiv(H, TH)
    offsets = tl.arange(0, TH * TW)
    h = (tile // across) % down * TH + offsets // TW
    w = tile % across * TW + offsets % TW
    return (tile // (across * down)).to(tl.int64), h, w


@triton.jit
def convolve(
    acc, x, weight, h, w, n, H, W, C: tl.constexpr, SIZE: tl.constexpr, DILATION: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add to acc [pixels, out] the SIZE x SIZE convolution of image `x` at pixels (h, w), for output channels n.

    `weight` is [C, SIZE * SIZE, C]: out, tap, in. TRANSPOSED computes the input gradient, with mirrored taps.
    """
    blocks: tl.constexpr = C // BK
    for i in range(0, SIZE * SIZE * blocks):
        tap = i // blocks
        k = i % blocks * BK + tl.arange(0, BK)
        down = (tap // SIZE - SIZE // 2) * DILATION
        right = (tap % SIZE - SIZE // 2) * DILATION
        if TRANSPOSED:
            hh = h - down
            ww = w - right
            tap_weight = weight + (k[:, None] * (SIZE * SIZE) + tap) * C + n[None, :]
        else:
            hh = h + down
            ww = w + right
            tap_weight = weight + (n[None, :] * (SIZE * SIZE) + tap) * C + k[:, None]
        inside = (hh >= 0) & (hh < H) & (ww >= 0) & (ww < W)
        a = tl.load(x + (hh * W + ww)[:, None] * C + k[None, :], mask=inside[:, None], other=0.0)
        acc = dot(a, tl.load(tap_weight), acc, UPCAST)
    return acc


@triton.jit
def apply_norm(value, norm, c, CHANNELS: tl.constexpr):
    """Normalize value [pixels, c] with the first three rows of table `norm` [.., CHANNELS]."""
    center = tl.load(norm + c)
    scale = tl.load(norm + CHANNELS + c)
    shift = tl.load(norm + 2 * CHANNELS + c)
    return (value - center[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def apply_gate(skip, value, norm, c, CHANNELS: tl.constexpr):
    """Return skip * (1 + sigmoid(norm(value)))."""
    return skip + skip * tl.sigmoid(apply_norm(value, norm, c, CHANNELS))


# Ahead-of-time compile specs.

BF16_TENSORS = {"x", "u", "v", "y", "out", "weight", "w_pointwise", "w_ordinary", "w_dilated", "w_vote"}
BF16_TENSORS |= {"u_pointwise", "u_ordinary", "u_dilated", "dx", "dy", "du", "dv", "g"}
FP32_TENSORS = {"norm", "vote_norm", "bias", "gamma", "beta", "partial", "counts", "sums"}


def gate_pixels(channels: int) -> tuple[int, int]:
    """Return side and number of pixels of the paper's gate with `channels` channels, for 8 images of 256x256."""
    side = 16384 // channels
    return side, 8 * side * side


def make_compile_spec(
    name: str,
    kernel: Any,
    channels: int,
    constants: dict[str, Any],
    options: dict[str, int],
    *,
    tensor_cores: bool = True,
    pixels_per_split: int = 0,
) -> CompileSpec:
    """Build a bfloat16 spec for the gate with `channels` channels."""
    side, pixels = gate_pixels(channels)
    types = dict.fromkeys(BF16_TENSORS, "*bf16") | dict.fromkeys(FP32_TENSORS, "*fp32")
    values = {
        "H": side,
        "W": side,
        "pixels": pixels,
        "tiles": pixels // 128,
        "pixels_per_split": pixels_per_split,
        "eps": 1e-5,
    }
    return CompileSpec(
        f"msag.{name} bf16 C{channels}",
        kernel,
        {argument: types[argument] for argument in kernel.arg_names if argument in types},
        {argument: value for argument, value in values.items() if argument in kernel.arg_names},
        constants,
        options,
        tensor_cores,
    )
