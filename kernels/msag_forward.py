"""The multi-scale attention gate, forward: its Triton kernels and their launches. `msag.py` makes operators of them.

    u_i = conv_i(x)                 i = pointwise, ordinary 3x3, dilated 3x3; each C -> C       (Eq. 5)
    v   = sum_i W_i relu(norm_i(u_i)), W = the vote convolution, 3C -> C                        (Eq. 6)
    y   = x + x * sigmoid(norm_v(v))

Tensors are channels-last: a row of memory is one pixel's C channels, so every convolution is a matrix product whose
A tile is a shifted tile of pixels. Weights are read where they lie, [out, tap, in], in both directions. A norm is a
table of rows, one value a channel: norm(u) = (u - centre) * scale + shift. In evaluation a convolution's bias goes into
the centre; nothing is folded into the weights, so nothing is rounded twice.

Training cannot be one kernel, because a norm waits for all pixels: convolution -> statistics -> vote -> statistics ->
gate. A tile leaves its count, mean and sum of squared deviations, and one program a block of channels merges them in a
fixed order (Chan et al. 1979): no atomics, so two runs agree bit by bit, and no E[u²] - E[u]², so a large mean does no
harm. Passes over a [B,C,H,W] tensor: x, u out | u in, v out | x, v, y = 11; eager takes about 50.

The convolution does its three branches one after another, each with one accumulator: reading the centre tile once for
all three would save 2 of 19 reads, from L2, and cost two more accumulators, that is a tile of half the size and every
weight read twice as often.
"""

# mypy: disallow-untyped-defs=False

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from mgcc_dist.kernels.case import Case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EVALUATION_FORMS = ("one_kernel", "two_kernels", "library_and_tail")


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


def convolution_tiles(channels: int) -> Tiles:
    """256 pixels by 64 channels or 128 by 128: 64 accumulators a thread, and the least L2 traffic that these allow."""
    out = dividing(channels, 128)
    rows = 8 if out == 128 else 16
    return Tiles(rows, 16, out, dividing(channels, 64), warps=8, stages=3)


def evaluation_tiles(channels: int) -> Tiles:
    """Of the one kernel: the accumulators [pixels, C] of the votes and [pixels, out] of a branch live together.

    These depths are those without spills on sm_80.
    """
    return Tiles(8, 16, min(channels, 64), 64 if channels == 128 else min(channels, 32), warps=8, stages=3)


def vote_tiles(channels: int) -> Tiles:
    """The pixels of a tile are consecutive here."""
    return Tiles(1, 128, dividing(channels, 128), dividing(channels, 64), warps=8, stages=3)


def strip(channels: int) -> tuple[int, int]:
    """Pixels and channels of an elementwise program: 4096 elements."""
    out = dividing(channels, 128)
    return 4096 // out, out


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
def store_moments(value, valid, partial, counts, tile, c, CHANNELS: tl.constexpr, first):
    """Mean and sum of squared deviations of `value` [pixels, c] over its valid pixels, and if `first` their count."""
    count = tl.sum(valid.to(value.dtype), 0)
    mean = tl.sum(tl.where(valid[:, None], value, 0.0), 0) / count
    deviation = tl.where(valid[:, None], value - mean[None, :], 0.0)
    tl.store(partial + tile * (2 * CHANNELS) + c, mean)
    tl.store(partial + tile * (2 * CHANNELS) + CHANNELS + c, tl.sum(deviation * deviation, 0))
    tl.store(counts + tile, count, mask=first)


@triton.jit
def branch_of_convolution(
    x, weight, bias, norm, u, partial, counts, tile, h, w, n, H, W, C: tl.constexpr, BRANCH: tl.constexpr,
    SIZE: tl.constexpr, DILATION: tl.constexpr, PIXELS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FOLDED: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((PIXELS, BN), ACC)
    acc = convolve(acc, x, weight, h, w, n, H, W, C, SIZE, DILATION, BK, False, UPCAST)
    c = BRANCH * C + n
    valid = (h < H) & (w < W)
    if FOLDED:
        value = tl.maximum(normalized(acc, norm, c, 3 * C), 0.0).to(u.dtype.element_ty)
    else:
        value = (acc + tl.load(bias + c).to(ACC)[None, :]).to(u.dtype.element_ty)
        # Of the rounded values: they are what will be normalized.
        store_moments(value.to(ACC), valid, partial, counts, tile, c, 3 * C, (BRANCH == 0) & (tl.min(n, 0) == 0))
    tl.store(u + (h * W + w)[:, None] * C + n[None, :], value, mask=valid[:, None])


@triton.jit
def triple_convolution(
    x, w_pointwise, w_ordinary, w_dilated, bias, norm, u, partial, counts, H, W, pixels,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FOLDED: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """u [3,B,H,W,C] = the three convolutions of x. FOLDED: then norm [3,3C] and ReLU; else `bias` [3C] and moments."""
    # Programs that share a tile of pixels are neighbours, so that it stays in L2.
    tile = tl.program_id(0) // (C // BN)
    n = tl.program_id(0) % (C // BN) * BN + tl.arange(0, BN)
    image, h, w = pixels_of_tile(tile, H, W, TH, TW)
    plane = image * (H * W * C)
    branch = tl.full((), C, tl.int64) * pixels
    x += plane
    u += plane
    branch_of_convolution(
        x, w_pointwise, bias, norm, u, partial, counts, tile, h, w, n, H, W, C, 0, 1, 1, TH * TW, BN, BK,
        FOLDED, ACC, UPCAST,
    )  # fmt: skip
    u += branch
    branch_of_convolution(
        x, w_ordinary, bias, norm, u, partial, counts, tile, h, w, n, H, W, C, 1, 3, 1, TH * TW, BN, BK,
        FOLDED, ACC, UPCAST,
    )  # fmt: skip
    u += branch
    branch_of_convolution(
        x, w_dilated, bias, norm, u, partial, counts, tile, h, w, n, H, W, C, 2, 3, 2, TH * TW, BN, BK,
        FOLDED, ACC, UPCAST,
    )  # fmt: skip


@triton.jit
def merge_moments(
    partial, counts, gamma, beta, norm, tiles, pixels, eps, CHANNELS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """norm [5, CHANNELS] of a batch: its mean, gamma / sigma, beta, 1 / sigma and its (biased) variance."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    # Sums of differences from the first tile's mean keep their digits where the mean is large.
    origin = tl.load(partial + c)
    total = tl.zeros((BC,), ACC)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        count = tl.load(counts + t, mask=t < tiles, other=0.0)
        mean = tl.load(partial + t[:, None] * (2 * CHANNELS) + c[None, :], mask=(t < tiles)[:, None], other=0.0)
        total += tl.sum(count[:, None] * (mean - origin[None, :]), 0)
    merged = origin + total / pixels
    squares = tl.zeros((BC,), ACC)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        count = tl.load(counts + t, mask=t < tiles, other=0.0)
        row = partial + t[:, None] * (2 * CHANNELS) + c[None, :]
        mean = tl.load(row, mask=(t < tiles)[:, None], other=0.0)
        within = tl.load(row + CHANNELS, mask=(t < tiles)[:, None], other=0.0)
        between = (mean - merged[None, :]) * (mean - merged[None, :])
        squares += tl.sum(within + count[:, None] * between, 0)
    variance = squares / pixels
    reciprocal = 1.0 / tl.sqrt(variance + eps)
    tl.store(norm + c, merged)
    tl.store(norm + CHANNELS + c, tl.load(gamma + c).to(ACC) * reciprocal)
    tl.store(norm + 2 * CHANNELS + c, tl.load(beta + c).to(ACC))
    tl.store(norm + 3 * CHANNELS + c, reciprocal)
    tl.store(norm + 4 * CHANNELS + c, variance)


@triton.jit
def vote_of_branch(
    acc, u, weight, norm, valid, row, n, C: tl.constexpr, BRANCH: tl.constexpr, BK: tl.constexpr,
    NORMALIZE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for start in range(0, C, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(u + row[:, None] * C + k[None, :], mask=valid[:, None], other=0.0)
        if NORMALIZE:
            a = tl.maximum(normalized(a.to(acc.dtype), norm, BRANCH * C + k, 3 * C), 0.0).to(a.dtype)
        b = tl.load(weight + n[None, :] * (3 * C) + BRANCH * C + k[:, None])
        acc = dot(a, b, acc, UPCAST)
    return acc


@triton.jit
def vote(
    u_pointwise, u_ordinary, u_dilated, weight, norm, bias, vote_norm, x, out, partial, counts, pixels,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORMALIZE: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The vote `weight` [C,3C] over the branches [pixels,C]. NORMALIZE: they get norm [.,3C] and ReLU first.

    GATE: out = y, by `vote_norm` [.,C] and `x`. Otherwise out = v with `bias` [C], and its moments.
    """
    tile = tl.program_id(0) // (C // BN)
    n = tl.program_id(0) % (C // BN) * BN + tl.arange(0, BN)
    first = tile.to(tl.int64) * BM
    row = tl.arange(0, BM)
    valid = row < pixels - first
    acc = tl.zeros((BM, BN), ACC)
    base = first * C
    acc = vote_of_branch(acc, u_pointwise + base, weight, norm, valid, row, n, C, 0, BK, NORMALIZE, UPCAST)
    acc = vote_of_branch(acc, u_ordinary + base, weight, norm, valid, row, n, C, 1, BK, NORMALIZE, UPCAST)
    acc = vote_of_branch(acc, u_dilated + base, weight, norm, valid, row, n, C, 2, BK, NORMALIZE, UPCAST)
    place = row[:, None] * C + n[None, :]
    if GATE:
        gate = tl.sigmoid(normalized(acc, vote_norm, n, C))
        skip = tl.load(x + base + place, mask=valid[:, None], other=0.0).to(ACC)
        value = (skip + skip * gate).to(out.dtype.element_ty)
    else:
        value = (acc + tl.load(bias + n).to(ACC)[None, :]).to(out.dtype.element_ty)
        store_moments(value.to(ACC), valid, partial, counts, tile, n, C, tl.min(n, 0) == 0)
    tl.store(out + base + place, value, mask=valid[:, None])


@triton.jit
def gate(x, v, norm, y, pixels, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """y = x + x * sigmoid(norm(v)), all [pixels, C]."""
    first = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    place = row[:, None] * C + c[None, :]
    valid = (row < pixels - first)[:, None]
    skip = tl.load(x + first * C + place, mask=valid, other=0.0).to(ACC)
    voted = tl.load(v + first * C + place, mask=valid, other=0.0).to(ACC)
    value = skip + skip * tl.sigmoid(normalized(voted, norm, c, C))
    tl.store(y + first * C + place, value.to(y.dtype.element_ty), mask=valid)


@triton.jit
def evaluation_branch(
    votes, x, weight, w_vote, norm, h, w, n, H, W, C: tl.constexpr, BRANCH: tl.constexpr,
    SIZE: tl.constexpr, DILATION: tl.constexpr, PIXELS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """votes [pixels, C] += those of one branch, BN of its channels at a time."""
    for start in tl.static_range(0, C, BN):
        k = start + tl.arange(0, BN)
        acc = tl.zeros((PIXELS, BN), ACC)
        acc = convolve(acc, x, weight, h, w, k, H, W, C, SIZE, DILATION, BK, False, UPCAST)
        u = tl.maximum(normalized(acc, norm, BRANCH * C + k, 3 * C), 0.0).to(x.dtype.element_ty)
        votes = dot(u, tl.load(w_vote + n[None, :] * (3 * C) + BRANCH * C + k[:, None]), votes, UPCAST)
    return votes


@triton.jit
def whole_gate(
    x, w_pointwise, w_ordinary, w_dilated, w_vote, norm, vote_norm, y, H, W,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gate in evaluation, of one tile of pixels and all channels: u stays in registers, branch after branch."""
    image, h, w = pixels_of_tile(tl.program_id(0), H, W, TH, TW)
    plane = image * (H * W * C)
    x += plane
    n = tl.arange(0, C)
    votes = tl.zeros((TH * TW, C), ACC)
    votes = evaluation_branch(
        votes, x, w_pointwise, w_vote, norm, h, w, n, H, W, C, 0, 1, 1, TH * TW, BN, BK, ACC, UPCAST
    )  # fmt: skip
    votes = evaluation_branch(
        votes, x, w_ordinary, w_vote, norm, h, w, n, H, W, C, 1, 3, 1, TH * TW, BN, BK, ACC, UPCAST
    )  # fmt: skip
    votes = evaluation_branch(
        votes, x, w_dilated, w_vote, norm, h, w, n, H, W, C, 2, 3, 2, TH * TW, BN, BK, ACC, UPCAST
    )  # fmt: skip
    place = (h * W + w)[:, None] * C + n[None, :]
    valid = ((h < H) & (w < W))[:, None]
    skip = tl.load(x + place, mask=valid, other=0.0).to(ACC)
    value = skip + skip * tl.sigmoid(normalized(votes, vote_norm, n, C))
    tl.store(y + plane + place, value.to(y.dtype.element_ty), mask=valid)


def plane_tiles(x: Tensor, tiles: Tiles) -> int:
    batch, _, height, width = x.shape
    return batch * triton.cdiv(height, tiles.rows) * triton.cdiv(width, tiles.columns)


def convolve_thrice(x: Tensor, weights: list[Tensor], *, bias: Tensor | None = None, norm: Tensor | None = None):
    """u [3,B,H,W,C] of x [B,C,H,W] channels-last: with `norm` [.,3C] applied and ReLU, or with `bias` [3C] and moments.

    Returns u, the moments [tiles,2,3C] and the counts [tiles]; these two are None with `norm`.
    """
    batch, channels, height, width = x.shape
    tiles = convolution_tiles(channels)
    count = plane_tiles(x, tiles)
    u = x.new_empty(3, batch, height, width, channels)
    partial = counts = None
    if norm is None:
        partial = x.new_empty(count, 2, 3 * channels, dtype=statistics_dtype(x.dtype))
        counts = partial.new_empty(count)
    triple_convolution[(count * (channels // tiles.out),)](
        x, *weights, bias, norm, u, partial, counts, height, width, batch * height * width,
        C=channels, TH=tiles.rows, TW=tiles.columns, BN=tiles.out, BK=tiles.depth, FOLDED=norm is not None,
        ACC=accumulator(x.dtype), UPCAST=upcast(x.dtype), **tiles.options(),
    )  # fmt: skip
    return u, partial, counts


def merge(partial: Tensor, counts: Tensor, gamma: Tensor, beta: Tensor, pixels: int, eps: float) -> Tensor:
    """The norm [5, channels] of a batch from its tiles' moments."""
    channels = gamma.numel()
    norm = partial.new_empty(5, channels)
    block = dividing(channels, 16)
    merge_moments[(channels // block,)](
        partial, counts, gamma, beta, norm, len(counts), pixels, eps,
        CHANNELS=channels, BT=256, BC=block, ACC=accumulator(partial.dtype), num_warps=8,
    )  # fmt: skip
    return norm


def cast_vote(u: list[Tensor], weight: Tensor, x: Tensor, *, norm=None, bias=None, vote_norm=None):
    """`vote` over the branches u, each of x's size: y if there is `vote_norm`, else v with its moments and counts."""
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    tiles = vote_tiles(channels)
    count = triton.cdiv(pixels, tiles.pixels)
    out = torch.empty_like(x)
    partial = counts = None
    if vote_norm is None:
        partial = x.new_empty(count, 2, channels, dtype=statistics_dtype(x.dtype))
        counts = partial.new_empty(count)
    vote[(count * (channels // tiles.out),)](
        *u, weight, norm, bias, vote_norm, x, out, partial, counts, pixels,
        C=channels, BM=tiles.pixels, BN=tiles.out, BK=tiles.depth, NORMALIZE=norm is not None,
        GATE=vote_norm is not None, ACC=accumulator(x.dtype), UPCAST=upcast(x.dtype), **tiles.options(),
    )  # fmt: skip
    return out, partial, counts


def apply_gate(x: Tensor, v: Tensor, norm: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    pixels, block = strip(channels)
    y = torch.empty_like(x)
    gate[(triton.cdiv(batch * height * width, pixels), channels // block)](
        x, v, norm, y, batch * height * width, C=channels, BM=pixels, BC=block, ACC=accumulator(x.dtype), num_warps=8
    )
    return y


def evaluate(x: Tensor, weights: list[Tensor], w_vote: Tensor, norm: Tensor, vote_norm: Tensor, form: str) -> Tensor:
    """The gate by running statistics: x [B,C,H,W], channels-last; norms [3,3C] and [3,C].

    one_kernel: all of it in one; C a power of two up to 128
    two_kernels: the convolutions with norm and ReLU, then the vote with the gate
    library_and_tail: the library's convolutions, then norm, ReLU, vote and gate in one kernel
    """
    _, channels, height, width = x.shape
    if form == "one_kernel":
        tiles = evaluation_tiles(channels)
        y = torch.empty_like(x)
        whole_gate[(plane_tiles(x, tiles),)](
            x, *weights, w_vote, norm, vote_norm, y, height, width,
            C=channels, TH=tiles.rows, TW=tiles.columns, BN=tiles.out, BK=tiles.depth,
            ACC=accumulator(x.dtype), UPCAST=upcast(x.dtype), **tiles.options(),
        )  # fmt: skip
        return y
    if form == "two_kernels":
        u, _, _ = convolve_thrice(x, weights, norm=norm)
        return cast_vote(list(u), w_vote, x, vote_norm=vote_norm)[0]
    if form == "library_and_tail":
        branches = [
            F.conv2d(x, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
            for weight, dilation in zip(weights, (1, 1, 2), strict=True)
        ]
        u = [branch.contiguous(memory_format=torch.channels_last) for branch in branches]
        return cast_vote(u, w_vote, x, norm=norm, vote_norm=vote_norm)[0]
    raise ValueError(f"no form {form!r} of the gate in evaluation; there are {', '.join(EVALUATION_FORMS)}")


def train(
    x: Tensor,
    weights: list[Tensor],
    w_vote: Tensor,
    biases: Tensor,
    gammas: Tensor,
    betas: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gate by the batch's statistics: y, and what the backward needs: u [3,B,H,W,C], v, norms [5,3C] and [5,C].

    `biases`, `gammas` and `betas` are [4C]: of the three branches and the vote.
    """
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    branches = 3 * channels
    u, partial, counts = convolve_thrice(x, weights, bias=biases[:branches])
    norm = merge(partial, counts, gammas[:branches], betas[:branches], pixels, eps)
    v, partial, counts = cast_vote(list(u), w_vote, x, norm=norm, bias=biases[branches:])
    vote_norm = merge(partial, counts, gammas[branches:], betas[branches:], pixels, eps)
    return apply_gate(x, v, vote_norm), u, v, norm, vote_norm


def cases(channels: int) -> list[Case]:
    """The compiled forms for `channels`, in bfloat16."""
    number = {"C": channels, "ACC": tl.float32}
    half = dict.fromkeys(("x", "w_pointwise", "w_ordinary", "w_dilated", "w_vote", "weight", "y", "out", "v"), "*bf16")
    half |= dict.fromkeys(("u", "u_pointwise", "u_ordinary", "u_dilated"), "*bf16")
    single = dict.fromkeys(("bias", "norm", "vote_norm", "partial", "counts", "gamma", "beta"), "*fp32")
    types = half | single | {"H": "i32", "W": "i32", "pixels": "i32", "tiles": "i32", "eps": "fp32"}

    def case(name: str, kernel: Any, constants: dict[str, Any], options: dict[str, int], tensor_cores: bool = True):
        signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
        return Case(f"msag.{name} bf16 C{channels}", kernel, signature, constants, options, tensor_cores)

    tiles = convolution_tiles(channels)
    blocks = {"TH": tiles.rows, "TW": tiles.columns, "BN": tiles.out, "BK": tiles.depth, "UPCAST": False}
    folded = number | blocks | {"FOLDED": True, "bias": None, "partial": None, "counts": None}
    plain = number | blocks | {"FOLDED": False, "norm": None}
    found = [
        case("convolution folded", triple_convolution, folded, tiles.options()),
        case("convolution with moments", triple_convolution, plain, tiles.options()),
    ]
    tiles = vote_tiles(channels)
    blocks = number | {"BM": tiles.pixels, "BN": tiles.out, "BK": tiles.depth, "UPCAST": False}
    moments = {"NORMALIZE": True, "GATE": False, "vote_norm": None, "x": None}
    gated = {"GATE": True, "bias": None, "partial": None, "counts": None}
    found += [
        case("vote with moments", vote, blocks | moments, tiles.options()),
        case("vote with gate", vote, blocks | gated | {"NORMALIZE": False, "norm": None}, tiles.options()),
        case("vote with norm and gate", vote, blocks | gated | {"NORMALIZE": True}, tiles.options()),
    ]
    pixels, out = strip(channels)
    found += [
        case("gate", gate, number | {"BM": pixels, "BC": out}, {"num_warps": 8}, tensor_cores=False),
        case(
            "moments merged",
            merge_moments,
            {"CHANNELS": 3 * channels, "BT": 256, "BC": dividing(3 * channels, 16), "ACC": tl.float32},
            {"num_warps": 8},
            tensor_cores=False,
        ),
    ]
    if channels <= 128:
        tiles = evaluation_tiles(channels)
        blocks = number | {"TH": tiles.rows, "TW": tiles.columns, "BN": tiles.out, "BK": tiles.depth, "UPCAST": False}
        found.append(case("whole gate", whole_gate, blocks, tiles.options()))
    return found
