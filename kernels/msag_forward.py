"""The multi-scale attention gate, forward by the batch's statistics; its kernels also serve evaluation in two.

    u_i = conv_i(x)                 i = pointwise, ordinary 3x3, dilated 3x3; each C -> C       (Eq. 5)
    v   = sum_i W_i relu(norm_i(u_i)), W = the vote convolution, 3C -> C                        (Eq. 6)
    y   = x + x * sigmoid(norm_v(v))

Training cannot be one kernel, because a norm waits for all pixels: convolution -> statistics -> vote -> statistics ->
gate. A tile leaves its count, mean and sum of squared deviations, and one program a block of channels merges them in a
fixed order (Chan et al. 1979): no atomics, so two runs agree bit by bit, and no E[u²] - E[u]², so a large mean does no
harm. Passes over a [B,C,H,W] tensor: x, u out | u in, v out | x, v, y = 11; eager takes about 50.

The convolution does its three branches one after another, each with one accumulator: reading the centre tile once for
all three would save 2 of 19 reads, from L2, and cost two more accumulators, that is a tile of half the size and every
weight read twice as often.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.case import Case
from mgcc_dist.kernels.msag_tile import (
    accumulator,
    convolution_tiles,
    convolve,
    dividing,
    dot,
    gated,
    make_case,
    normalized,
    pixels_of_tile,
    plane_tiles,
    statistics_dtype,
    strip,
    strip_of_pixels,
    tile_and_channels,
    upcast,
    vote_tiles,
)
from mgcc_dist.kernels.targets import target_of


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
    tile, n = tile_and_channels(C, BN)
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
    tile, n = tile_and_channels(C, BN)
    first, row, valid = strip_of_pixels(tile, pixels, BM)
    acc = tl.zeros((BM, BN), ACC)
    base = first * C
    acc = vote_of_branch(acc, u_pointwise + base, weight, norm, valid, row, n, C, 0, BK, NORMALIZE, UPCAST)
    acc = vote_of_branch(acc, u_ordinary + base, weight, norm, valid, row, n, C, 1, BK, NORMALIZE, UPCAST)
    acc = vote_of_branch(acc, u_dilated + base, weight, norm, valid, row, n, C, 2, BK, NORMALIZE, UPCAST)
    place = row[:, None] * C + n[None, :]
    if GATE:
        skip = tl.load(x + base + place, mask=valid[:, None], other=0.0).to(ACC)
        value = gated(skip, acc, vote_norm, n, C).to(out.dtype.element_ty)
    else:
        value = (acc + tl.load(bias + n).to(ACC)[None, :]).to(out.dtype.element_ty)
        store_moments(value.to(ACC), valid, partial, counts, tile, n, C, tl.min(n, 0) == 0)
    tl.store(out + base + place, value, mask=valid[:, None])


@triton.jit
def gate(x, v, norm, y, pixels, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """y = x + x * sigmoid(norm(v)), all [pixels, C]."""
    first, row, valid = strip_of_pixels(tl.program_id(0), pixels, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    place = row[:, None] * C + c[None, :]
    skip = tl.load(x + first * C + place, mask=valid[:, None], other=0.0).to(ACC)
    voted = tl.load(v + first * C + place, mask=valid[:, None], other=0.0).to(ACC)
    value = gated(skip, voted, norm, c, C)
    tl.store(y + first * C + place, value.to(y.dtype.element_ty), mask=valid[:, None])


def convolve_thrice(x: Tensor, weights: list[Tensor], *, bias: Tensor | None = None, norm: Tensor | None = None):
    """u [3,B,H,W,C] of x [B,C,H,W] channels-last: with `norm` [.,3C] applied and ReLU, or with `bias` [3C] and moments.

    Returns u, the moments [tiles,2,3C] and the counts [tiles]; these two are None with `norm`.
    """
    batch, channels, height, width = x.shape
    tiles = convolution_tiles(channels, x.dtype, target_of(x.device))
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
    tiles = vote_tiles(channels, x.dtype, target_of(x.device))
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


def cases(channels: int, target: str) -> list[Case]:
    number = {"C": channels, "ACC": tl.float32}
    tiles = convolution_tiles(channels, torch.bfloat16, target)
    blocks = {"TH": tiles.rows, "TW": tiles.columns, "BN": tiles.out, "BK": tiles.depth, "UPCAST": False}
    folded = number | blocks | {"FOLDED": True, "bias": None, "partial": None, "counts": None}
    plain = number | blocks | {"FOLDED": False, "norm": None}
    found = [
        make_case("convolution folded", triple_convolution, channels, folded, tiles.options()),
        make_case("convolution with moments", triple_convolution, channels, plain, tiles.options()),
    ]
    tiles = vote_tiles(channels, torch.bfloat16, target)
    blocks = number | {"BM": tiles.pixels, "BN": tiles.out, "BK": tiles.depth, "UPCAST": False}
    moments = blocks | {"NORMALIZE": True, "GATE": False, "vote_norm": None, "x": None}
    gated = blocks | {"GATE": True, "bias": None, "partial": None, "counts": None}
    found += [
        make_case("vote with moments", vote, channels, moments, tiles.options()),
        make_case("vote with gate", vote, channels, gated | {"NORMALIZE": False, "norm": None}, tiles.options()),
        make_case("vote with norm and gate", vote, channels, gated | {"NORMALIZE": True}, tiles.options()),
    ]
    pixels, block = strip(channels)
    warps = {"num_warps": 8}
    strips = number | {"BM": pixels, "BC": block}
    merged = {"CHANNELS": 3 * channels, "BT": 256, "BC": dividing(3 * channels, 16), "ACC": tl.float32}
    return [
        *found,
        make_case("gate", gate, channels, strips, warps, tensor_cores=False),
        make_case("moments merged", merge_moments, channels, merged, warps, tensor_cores=False),
    ]
