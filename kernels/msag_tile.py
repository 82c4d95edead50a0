"""What the kernels of the multi-scale attention gate share: blocks by channels and GPU, tiles, products, norms.

Tensors are channels-last: a row of memory is one pixel's C channels, so every convolution is a matrix product whose
A tile is a shifted tile of pixels. Weights are read where they lie, [out, tap, in], in both directions. A norm is a
table of rows, one value a channel: norm(u) = (u - centre) * scale + shift.
"""

# mypy: disallow-untyped-defs=False

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.case import Case
from mgcc_dist.kernels.targets import INTERPRETED


class Tiles(NamedTuple):
    """Block sizes of the kernels that use tensor cores."""

    rows: int
    """of pixels in a tile"""
    columns: int
    """of pixels in a tile"""
    out: int
    """output channels of a program"""
    depth: int
    """channels that one product sums over"""
    warps: int
    stages: int

    @property
    def pixels(self) -> int:
        return self.rows * self.columns

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def dividing(channels: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides `channels`."""
    return min(channels & -channels, largest)


def line(channels: int, dtype: torch.dtype) -> int:
    """The depth of most products: channels in 128 bytes of a pixel."""
    return dividing(channels, 128 // dtype.itemsize)


def convolution_tiles(channels: int, dtype: torch.dtype, target: str) -> Tiles:
    """256 pixels by 64 channels or 128 by 128: 64 accumulators a thread, and the least L2 traffic that these allow."""
    out = dividing(channels, 128)
    rows = 8 if out == 128 else 16
    stages = 2 if target == "gfx942" and out < 128 else 3  # three take 80 of its 64 KiB of shared memory
    return Tiles(rows, 16, out, line(channels, dtype), warps=8, stages=stages)


def evaluation_tiles(channels: int, dtype: torch.dtype, target: str) -> Tiles:
    """Of the one kernel: the accumulators [pixels, C] of the votes and [pixels, out] of a branch live together.

    These depths are those without spills on sm_80.
    """
    depth = line(channels, dtype) if channels == 128 else min(channels, 32)
    stages = 2 if target == "sm_120" and channels == 128 else 3  # there, three spill
    return Tiles(8, 16, min(channels, 64), depth, warps=8, stages=stages)


def vote_tiles(channels: int, dtype: torch.dtype, target: str) -> Tiles:
    """The pixels of a tile are consecutive here."""
    out = dividing(channels, 128)
    if target == "gfx942" and out == 128:  # deeper, or in three stages, it spills
        return Tiles(1, 128, out, line(channels, dtype) // 2, warps=8, stages=2)
    return Tiles(1, 128, out, line(channels, dtype), warps=8, stages=3)


def weight_tiles(channels: int, dtype: torch.dtype) -> Tiles:
    """Of the vote's weight gradient: `columns` of the C outputs by `out` of the 3C inputs, `depth` pixels a product."""
    block = dividing(channels, 128)
    return Tiles(1, block, block, 128 // dtype.itemsize, warps=8, stages=3)


def strip(channels: int) -> tuple[int, int]:
    """Pixels and channels of an elementwise program: 4096 elements."""
    out = dividing(channels, 128)
    return 4096 // out, out


def plane_tiles(x: Tensor, tiles: Tiles) -> int:
    batch, _, height, width = x.shape
    return batch * triton.cdiv(height, tiles.rows) * triton.cdiv(width, tiles.columns)


def accumulator(dtype: torch.dtype) -> Any:
    """Triton's type of sums: float32, and float64 for gradcheck in the interpreter."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter multiplies the bit patterns of bfloat16 (triton issue 11584): there, products are in float32."""
    return INTERPRETED and dtype == torch.bfloat16


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def tile_and_channels(C: tl.constexpr, BN: tl.constexpr):
    """Of a program: its tile and output channels. Programs that share a tile are neighbours, so that it stays in L2."""
    return tl.program_id(0) // (C // BN), tl.program_id(0) % (C // BN) * BN + tl.arange(0, BN)


@triton.jit
def strip_of_pixels(tile, pixels, BM: tl.constexpr):
    """First pixel of a strip, the places of its pixels after that, and whether they are there."""
    first = tile.to(tl.int64) * BM
    row = tl.arange(0, BM)
    return first, row, row < pixels - first


@triton.jit
def pixels_of_tile(tile, H, W, TH: tl.constexpr, TW: tl.constexpr):
    """Image, rows and columns of a TH x TW tile; those of the last tiles may lie outside the plane."""
    across = tl.cdiv(W, TW)
    down = tl.cdiv(H, TH)
    place = tl.arange(0, TH * TW)
    h = (tile // across) % down * TH + place // TW
    w = tile % across * TW + place % TW
    return (tile // (across * down)).to(tl.int64), h, w


@triton.jit
def convolve(
    acc, x, weight, h, w, n, H, W, C: tl.constexpr, SIZE: tl.constexpr, DILATION: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc [pixels, out] += the SIZE x SIZE convolution at pixels (h, w) of image `x`, for the output channels n.

    `weight` is [C, SIZE², C]: out, tap, in; TRANSPOSED is the gradient to the input: the other way, taps mirrored.
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
def normalized(value, norm, c, CHANNELS: tl.constexpr):
    """value [pixels, c] by the first three rows of table `norm` [.., CHANNELS]."""
    centre = tl.load(norm + c)
    scale = tl.load(norm + CHANNELS + c)
    shift = tl.load(norm + 2 * CHANNELS + c)
    return (value - centre[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def gated(skip, value, norm, c, CHANNELS: tl.constexpr):
    """skip (1 + sigmoid(norm(value)))."""
    return skip + skip * tl.sigmoid(normalized(value, norm, c, CHANNELS))


# Compiled forms for the ledger.

HALVES = {"x", "u", "v", "y", "out", "weight", "w_pointwise", "w_ordinary", "w_dilated", "w_vote"}
HALVES |= {"u_pointwise", "u_ordinary", "u_dilated", "dx", "dy", "du", "dv", "g"}
SINGLES = {"norm", "vote_norm", "bias", "gamma", "beta", "partial", "counts", "sums"}


def gate_pixels(channels: int) -> tuple[int, int]:
    """Side and pixels of the paper's gate of `channels` for 8 images of 256x256."""
    side = 16384 // channels
    return side, 8 * side * side


def make_case(
    name: str,
    kernel: Any,
    channels: int,
    constants: dict[str, Any],
    options: dict[str, int],
    *,
    tensor_cores: bool = True,
    share: int = 0,
) -> Case:
    """In bfloat16, of the gate of `channels`; `share` is an argument of `vote_weight_gradient`."""
    side, pixels = gate_pixels(channels)
    types = dict.fromkeys(HALVES, "*bf16") | dict.fromkeys(SINGLES, "*fp32")
    values = {"H": side, "W": side, "pixels": pixels, "tiles": pixels // 128, "share": share, "eps": 1e-5}
    return Case(
        f"msag.{name} bf16 C{channels}",
        kernel,
        {argument: types[argument] for argument in kernel.arg_names if argument in types},
        {argument: value for argument, value in values.items() if argument in kernel.arg_names},
        constants,
        options,
        tensor_cores,
    )
