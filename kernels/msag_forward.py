"""The multi-scale attention gate, forward with batch statistics. Its kernels also serve the two-kernel evaluation.

    u_i = conv_i(x)                 i = pointwise, ordinary 3x3, dilated 3x3; each C -> C       (Eq. 5)
    v   = sum_i W_i relu(norm_i(u_i)), W = the vote convolution, 3C -> C                        (Eq. 6)
    y   = x + x * sigmoid(norm_v(v))

Training cannot be a single kernel, because each norm needs all pixels first: convolution -> statistics -> vote ->
statistics -> gate. Each tile stores its count, mean and sum of squared deviations. One program per block of channels
merges them in a fixed order (Chan et al. 1979). There are no atomics, so results are bit-reproducible, and no
E[u²] - E[u]², so a large mean does not cancel digits.

Saved for backward: x, u, v and the two norm tables. Bytes moved, in passes over a [B,C,H,W] tensor: read x and write u
(4), read u and write v (4), read x and v and write y (3); 11 in total. Eager PyTorch takes about 50.

The convolution kernel computes its three branches one after another with one accumulator each. Reading the center tap
once for all three would save 2 of 19 reads, which come from L2. It would cost two more accumulators, so tiles of half
the size and twice the reads of every weight.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.compile_spec import CompileSpec
from mgcc_dist.kernels.msag_tile import (
    accumulator_type,
    apply_gate,
    apply_norm,
    convolution_tiles,
    convolve,
    count_tiles,
    dot,
    elementwise_block,
    make_compile_spec,
    needs_upcast,
    pixel_block,
    power_of_two_divisor,
    statistics_dtype,
    tile_and_channels,
    tile_pixels,
    vote_tiles,
)
from mgcc_dist.kernels.targets import device_target


@triton.jit
def store_moments(value, valid, partial, counts, tile, c, CHANNELS: tl.constexpr, write_count):
    """Store mean and sum of squared deviations of `value` [pixels, c], and with `write_count` the count."""
    count = tl.sum(valid.to(value.dtype), 0)
    mean = tl.sum(tl.where(valid[:, None], value, 0.0), 0) / count
    deviation = tl.where(valid[:, None], value - mean[None, :], 0.0)
    tl.store(partial + tile * (2 * CHANNELS) + c, mean)
    tl.store(partial + tile * (2 * CHANNELS) + CHANNELS + c, tl.sum(deviation * deviation, 0))
    tl.store(counts + tile, count, mask=write_count)


@triton.jit
def convolve_branch(
    x, weight, bias, norm, u, partial, counts, tile, h, w, n, H, W, C: tl.constexpr, BRANCH: tl.constexpr,
    SIZE: tl.constexpr, DILATION: tl.constexpr, PIXELS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORM_OUTPUT: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute one branch of `branch_convolutions` for one tile."""
    acc = tl.zeros((PIXELS, BN), ACC)
    acc = convolve(acc, x, weight, h, w, n, H, W, C, SIZE, DILATION, BK, False, UPCAST)
    c = BRANCH * C + n
    valid = (h < H) & (w < W)
    if NORM_OUTPUT:
        value = tl.maximum(apply_norm(acc, norm, c, 3 * C), 0.0).to(u.dtype.element_ty)
    else:
        value = (acc + tl.load(bias + c).to(ACC)[None, :]).to(u.dtype.element_ty)
        # Statistics of the rounded values, because those are normalized later.
        store_moments(value.to(ACC), valid, partial, counts, tile, c, 3 * C, (BRANCH == 0) & (tl.min(n, 0) == 0))
    tl.store(u + (h * W + w)[:, None] * C + n[None, :], value, mask=valid[:, None])


@triton.jit
def branch_convolutions(
    x, w_pointwise, w_ordinary, w_dilated, bias, norm, u, partial, counts, H, W, pixels,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORM_OUTPUT: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """u [3,B,H,W,C] = the three convolutions of x.

    NORM_OUTPUT applies norm [3,3C] and ReLU. Otherwise `bias` [3C] is added and the moments are stored.
    """
    tile, n = tile_and_channels(C, BN)
    image, h, w = tile_pixels(tile, H, W, TH, TW)
    plane = image * (H * W * C)
    branch = tl.full((), C, tl.int64) * pixels
    x += plane
    u += plane
    convolve_branch(
        x, w_pointwise, bias, norm, u, partial, counts, tile, h, w, n, H, W, C, 0, 1, 1, TH * TW, BN, BK,
        NORM_OUTPUT, ACC, UPCAST,
    )  # fmt: skip
    u += branch
    convolve_branch(
        x, w_ordinary, bias, norm, u, partial, counts, tile, h, w, n, H, W, C, 1, 3, 1, TH * TW, BN, BK,
        NORM_OUTPUT, ACC, UPCAST,
    )  # fmt: skip
    u += branch
    convolve_branch(
        x, w_dilated, bias, norm, u, partial, counts, tile, h, w, n, H, W, C, 2, 3, 2, TH * TW, BN, BK,
        NORM_OUTPUT, ACC, UPCAST,
    )  # fmt: skip


@triton.jit
def merge_moments(
    partial, counts, gamma, beta, norm, tiles, pixels, eps, CHANNELS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Merge tile moments into a norm table [5, CHANNELS]: mean, gamma / sigma, beta, 1 / sigma, biased variance."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    # Summing differences from the first tile's mean avoids cancellation where the mean is large.
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
def accumulate_branch_votes(
    acc, u, weight, norm, valid, row, n, C: tl.constexpr, BRANCH: tl.constexpr, BK: tl.constexpr,
    NORM_INPUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one branch's part of the vote to acc."""
    for start in range(0, C, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(u + row[:, None] * C + k[None, :], mask=valid[:, None], other=0.0)
        if NORM_INPUT:
            a = tl.maximum(apply_norm(a.to(acc.dtype), norm, BRANCH * C + k, 3 * C), 0.0).to(a.dtype)
        b = tl.load(weight + n[None, :] * (3 * C) + BRANCH * C + k[:, None])
        acc = dot(a, b, acc, UPCAST)
    return acc


@triton.jit
def vote_kernel(
    u_pointwise, u_ordinary, u_dilated, weight, norm, bias, vote_norm, x, out, partial, counts, pixels,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORM_INPUT: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The vote convolution `weight` [C,3C] over the branches [pixels,C]; NORM_INPUT first applies norm [.,3C] and ReLU.

    GATE: out = y, from `vote_norm` [.,C] and `x`. Otherwise out = v with `bias` [C], and its moments are stored.
    """
    tile, n = tile_and_channels(C, BN)
    first, row, valid = pixel_block(tile, pixels, BM)
    acc = tl.zeros((BM, BN), ACC)
    base = first * C
    acc = accumulate_branch_votes(acc, u_pointwise + base, weight, norm, valid, row, n, C, 0, BK, NORM_INPUT, UPCAST)
    acc = accumulate_branch_votes(acc, u_ordinary + base, weight, norm, valid, row, n, C, 1, BK, NORM_INPUT, UPCAST)
    acc = accumulate_branch_votes(acc, u_dilated + base, weight, norm, valid, row, n, C, 2, BK, NORM_INPUT, UPCAST)
    offsets = row[:, None] * C + n[None, :]
    if GATE:
        skip = tl.load(x + base + offsets, mask=valid[:, None], other=0.0).to(ACC)
        value = apply_gate(skip, acc, vote_norm, n, C).to(out.dtype.element_ty)
    else:
        value = (acc + tl.load(bias + n).to(ACC)[None, :]).to(out.dtype.element_ty)
        store_moments(value.to(ACC), valid, partial, counts, tile, n, C, tl.min(n, 0) == 0)
    tl.store(out + base + offsets, value, mask=valid[:, None])


@triton.jit
def gate_kernel(x, v, norm, y, pixels, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """y = x + x * sigmoid(norm(v)), all [pixels, C]."""
    first, row, valid = pixel_block(tl.program_id(0), pixels, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    offsets = row[:, None] * C + c[None, :]
    skip = tl.load(x + first * C + offsets, mask=valid[:, None], other=0.0).to(ACC)
    v_value = tl.load(v + first * C + offsets, mask=valid[:, None], other=0.0).to(ACC)
    value = apply_gate(skip, v_value, norm, c, C)
    tl.store(y + first * C + offsets, value.to(y.dtype.element_ty), mask=valid[:, None])


def launch_branch_convolutions(
    x: Tensor, weights: list[Tensor], *, bias: Tensor | None = None, norm: Tensor | None = None
):
    """Return u [3,B,H,W,C] of x [B,C,H,W] channels-last, with its moments [tiles,2,3C] and counts [tiles].

    With `norm` [.,3C], norm and ReLU are applied, and moments and counts are None. Otherwise `bias` [3C] is added.
    """
    batch, channels, height, width = x.shape
    tiles = convolution_tiles(channels, x.dtype, device_target(x.device))
    count = count_tiles(x, tiles)
    u = x.new_empty(3, batch, height, width, channels)
    partial = counts = None
    if norm is None:
        partial = x.new_empty(count, 2, 3 * channels, dtype=statistics_dtype(x.dtype))
        counts = partial.new_empty(count)
    branch_convolutions[(count * (channels // tiles.block_n),)](
        x, *weights, bias, norm, u, partial, counts, height, width, batch * height * width,
        C=channels, TH=tiles.tile_h, TW=tiles.tile_w, BN=tiles.block_n, BK=tiles.block_k, NORM_OUTPUT=norm is not None,
        ACC=accumulator_type(x.dtype), UPCAST=needs_upcast(x.dtype), **tiles.options(),
    )  # fmt: skip
    return u, partial, counts


def launch_merge_moments(
    partial: Tensor, counts: Tensor, gamma: Tensor, beta: Tensor, pixels: int, eps: float
) -> Tensor:
    """Return the norm table [5, channels] of a batch from the moments of its tiles."""
    channels = gamma.numel()
    norm = partial.new_empty(5, channels)
    block = power_of_two_divisor(channels, 16)
    merge_moments[(channels // block,)](
        partial, counts, gamma, beta, norm, len(counts), pixels, eps,
        CHANNELS=channels, BT=256, BC=block, ACC=accumulator_type(partial.dtype), num_warps=8,
    )  # fmt: skip
    return norm


def launch_vote(u: list[Tensor], weight: Tensor, x: Tensor, *, norm=None, bias=None, vote_norm=None):
    """Run the vote over the branches u, each of x's size. Return y with `vote_norm`, else v, moments, counts."""
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    tiles = vote_tiles(channels, x.dtype, device_target(x.device))
    count = triton.cdiv(pixels, tiles.pixels)
    out = torch.empty_like(x)
    partial = counts = None
    if vote_norm is None:
        partial = x.new_empty(count, 2, channels, dtype=statistics_dtype(x.dtype))
        counts = partial.new_empty(count)
    vote_kernel[(count * (channels // tiles.block_n),)](
        *u, weight, norm, bias, vote_norm, x, out, partial, counts, pixels,
        C=channels, BM=tiles.pixels, BN=tiles.block_n, BK=tiles.block_k, NORM_INPUT=norm is not None,
        GATE=vote_norm is not None, ACC=accumulator_type(x.dtype), UPCAST=needs_upcast(x.dtype), **tiles.options(),
    )  # fmt: skip
    return out, partial, counts


def launch_gate(x: Tensor, v: Tensor, norm: Tensor) -> Tensor:
    """Return y = x + x * sigmoid(norm(v))."""
    batch, channels, height, width = x.shape
    pixels, block = elementwise_block(channels)
    y = torch.empty_like(x)
    gate_kernel[(triton.cdiv(batch * height * width, pixels), channels // block)](
        x,
        v,
        norm,
        y,
        batch * height * width,
        C=channels,
        BM=pixels,
        BC=block,
        ACC=accumulator_type(x.dtype),
        num_warps=8,
    )
    return y


def train_forward(
    x: Tensor,
    weights: list[Tensor],
    w_vote: Tensor,
    biases: Tensor,
    gammas: Tensor,
    betas: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gate with batch statistics: y and what backward needs, u [3,B,H,W,C], v, norm tables [5,3C] and [5,C].

    `biases`, `gammas` and `betas` are [4C]: those of the three branches, then the vote's.
    """
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    branches = 3 * channels
    u, partial, counts = launch_branch_convolutions(x, weights, bias=biases[:branches])
    norm = launch_merge_moments(partial, counts, gammas[:branches], betas[:branches], pixels, eps)
    v, partial, counts = launch_vote(list(u), w_vote, x, norm=norm, bias=biases[branches:])
    vote_norm = launch_merge_moments(partial, counts, gammas[branches:], betas[branches:], pixels, eps)
    return launch_gate(x, v, vote_norm), u, v, norm, vote_norm


def compile_specs(channels: int, target: str) -> list[CompileSpec]:
    """Specs for training and for the two-kernel evaluation."""
    shared = {"C": channels, "ACC": tl.float32}
    tiles = convolution_tiles(channels, torch.bfloat16, target)
    blocks = {"TH": tiles.tile_h, "TW": tiles.tile_w, "BN": tiles.block_n, "BK": tiles.block_k, "UPCAST": False}
    with_norm = shared | blocks | {"NORM_OUTPUT": True, "bias": None, "partial": None, "counts": None}
    with_moments = shared | blocks | {"NORM_OUTPUT": False, "norm": None}
    found = [
        make_compile_spec("branch convolutions with norm", branch_convolutions, channels, with_norm, tiles.options()),
        make_compile_spec(
            "branch convolutions with moments", branch_convolutions, channels, with_moments, tiles.options()
        ),
    ]
    tiles = vote_tiles(channels, torch.bfloat16, target)
    blocks = shared | {"BM": tiles.pixels, "BN": tiles.block_n, "BK": tiles.block_k, "UPCAST": False}
    moments = blocks | {"NORM_INPUT": True, "GATE": False, "vote_norm": None, "x": None}
    gated = blocks | {"GATE": True, "bias": None, "partial": None, "counts": None}
    found += [
        make_compile_spec("vote with moments", vote_kernel, channels, moments, tiles.options()),
        make_compile_spec(
            "vote with gate",
            vote_kernel,
            channels,
            gated | {"NORM_INPUT": False, "norm": None},
            tiles.options(),
        ),
        make_compile_spec(
            "vote with norm and gate",
            vote_kernel,
            channels,
            gated | {"NORM_INPUT": True},
            tiles.options(),
        ),
    ]
    pixels, block = elementwise_block(channels)
    warps = {"num_warps": 8}
    elementwise = shared | {"BM": pixels, "BC": block}
    merged = {"CHANNELS": 3 * channels, "BT": 256, "BC": power_of_two_divisor(3 * channels, 16), "ACC": tl.float32}
    return [
        *found,
        make_compile_spec("gate", gate_kernel, channels, elementwise, warps, tensor_cores=False),
        make_compile_spec("merge moments", merge_moments, channels, merged, warps, tensor_cores=False),
    ]
