"""Kernels of the gate with batch statistics; all but the last two also serve the two-kernel evaluation."""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from .device import apply_gate, apply_norm, convolve, dot, pixel_block, tile_and_channels, tile_pixels


@triton.jit
def store_moments(
    value, valid,
    partial_ptr,  # [tiles,2,CHANNELS]
    counts_ptr,  # [tiles]
    tile, c,
    CHANNELS: tl.constexpr,
    write_count,
):  # fmt: skip
    """Store mean and sum of squared deviations of `value` [pixels, c], and with `write_count` the count."""
    count = tl.sum(valid.to(value.dtype), 0)
    mean = tl.sum(tl.where(valid[:, None], value, 0.0), 0) / count
    deviation = tl.where(valid[:, None], value - mean[None, :], 0.0)
    tl.store(partial_ptr + tile * (2 * CHANNELS) + c, mean)
    tl.store(partial_ptr + tile * (2 * CHANNELS) + CHANNELS + c, tl.sum(deviation * deviation, 0))
    tl.store(counts_ptr + tile, count, mask=write_count)


@triton.jit
def convolve_branch(
    x_ptr,  # one image [H,W,C]
    weight_ptr,  # [C,SIZE * SIZE,C]: out, tap, in
    bias_ptr,  # [3C]
    norm_ptr,  # [3 or 5,3C]
    u_ptr,  # one image [H,W,C]
    partial_ptr,  # [tiles,2,3C]
    counts_ptr,  # [tiles]
    tile, h, w, n, H, W,
    C: tl.constexpr, BRANCH: tl.constexpr, SIZE: tl.constexpr, DILATION: tl.constexpr, PIXELS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, NORM_OUTPUT: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute one branch of `branch_convolutions` for one tile."""
    acc = tl.zeros((PIXELS, BN), ACC)
    acc = convolve(acc, x_ptr, weight_ptr, h, w, n, H, W, C, SIZE, DILATION, BK, False, UPCAST)
    c = BRANCH * C + n
    valid = (h < H) & (w < W)
    if NORM_OUTPUT:
        value = tl.maximum(apply_norm(acc, norm_ptr, c, 3 * C), 0.0).to(u_ptr.dtype.element_ty)
    else:
        value = (acc + tl.load(bias_ptr + c).to(ACC)[None, :]).to(u_ptr.dtype.element_ty)
        # Statistics of the rounded values, because those are normalized later.
        store_moments(
            value.to(ACC), valid, partial_ptr, counts_ptr, tile, c, 3 * C, (BRANCH == 0) & (tl.min(n, 0) == 0)
        )
    tl.store(u_ptr + (h * W + w)[:, None] * C + n[None, :], value, mask=valid[:, None])


@triton.jit
def branch_convolutions(
    x_ptr,  # [B,H,W,C]
    w_pointwise_ptr,  # [C,1,C]: out, tap, in
    w_ordinary_ptr, w_dilated_ptr,  # [C,9,C]
    bias_ptr,  # [3C]; None with NORM_OUTPUT
    norm_ptr,  # [3 or 5,3C]; None without NORM_OUTPUT
    u_ptr,  # [3,B,H,W,C]
    partial_ptr,  # [tiles,2,3C]; None with NORM_OUTPUT
    counts_ptr,  # [tiles]; None with NORM_OUTPUT
    H, W, pixels,
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
    x_ptr += plane
    u_ptr += plane
    convolve_branch(
        x_ptr, w_pointwise_ptr, bias_ptr, norm_ptr, u_ptr, partial_ptr, counts_ptr, tile, h, w, n, H, W,
        C, 0, 1, 1, TH * TW, BN, BK, NORM_OUTPUT, ACC, UPCAST,
    )  # fmt: skip
    u_ptr += branch
    convolve_branch(
        x_ptr, w_ordinary_ptr, bias_ptr, norm_ptr, u_ptr, partial_ptr, counts_ptr, tile, h, w, n, H, W,
        C, 1, 3, 1, TH * TW, BN, BK, NORM_OUTPUT, ACC, UPCAST,
    )  # fmt: skip
    u_ptr += branch
    convolve_branch(
        x_ptr, w_dilated_ptr, bias_ptr, norm_ptr, u_ptr, partial_ptr, counts_ptr, tile, h, w, n, H, W,
        C, 2, 3, 2, TH * TW, BN, BK, NORM_OUTPUT, ACC, UPCAST,
    )  # fmt: skip


@triton.jit
def merge_moments(
    partial_ptr,  # [tiles,2,CHANNELS]
    counts_ptr,  # [tiles]
    gamma_ptr, beta_ptr,  # [CHANNELS]
    norm_ptr,  # [5,CHANNELS]
    tiles, pixels, eps,
    CHANNELS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Merge tile moments into a norm table [5, CHANNELS]: mean, gamma / sigma, beta, 1 / sigma, biased variance."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    # Summing differences from the first tile's mean avoids cancellation where the mean is large.
    origin = tl.load(partial_ptr + c)
    total = tl.zeros((BC,), ACC)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        count = tl.load(counts_ptr + t, mask=t < tiles, other=0.0)
        mean = tl.load(partial_ptr + t[:, None] * (2 * CHANNELS) + c[None, :], mask=(t < tiles)[:, None], other=0.0)
        total += tl.sum(count[:, None] * (mean - origin[None, :]), 0)
    merged = origin + total / pixels
    squares = tl.zeros((BC,), ACC)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        count = tl.load(counts_ptr + t, mask=t < tiles, other=0.0)
        row = partial_ptr + t[:, None] * (2 * CHANNELS) + c[None, :]
        mean = tl.load(row, mask=(t < tiles)[:, None], other=0.0)
        within = tl.load(row + CHANNELS, mask=(t < tiles)[:, None], other=0.0)
        between = (mean - merged[None, :]) * (mean - merged[None, :])
        squares += tl.sum(within + count[:, None] * between, 0)
    variance = squares / pixels
    reciprocal = 1.0 / tl.sqrt(variance + eps)
    tl.store(norm_ptr + c, merged)
    tl.store(norm_ptr + CHANNELS + c, tl.load(gamma_ptr + c).to(ACC) * reciprocal)
    tl.store(norm_ptr + 2 * CHANNELS + c, tl.load(beta_ptr + c).to(ACC))
    tl.store(norm_ptr + 3 * CHANNELS + c, reciprocal)
    tl.store(norm_ptr + 4 * CHANNELS + c, variance)


@triton.jit
def accumulate_branch_votes(
    acc,
    u_ptr,  # pixels of one branch [BM,C]
    weight_ptr,  # [C,3C]
    norm_ptr,  # [3 or 5,3C]
    valid, row, n,
    C: tl.constexpr, BRANCH: tl.constexpr, BK: tl.constexpr, NORM_INPUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one branch's part of the vote to acc."""
    for start in range(0, C, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(u_ptr + row[:, None] * C + k[None, :], mask=valid[:, None], other=0.0)
        if NORM_INPUT:
            a = tl.maximum(apply_norm(a.to(acc.dtype), norm_ptr, BRANCH * C + k, 3 * C), 0.0).to(a.dtype)
        b = tl.load(weight_ptr + n[None, :] * (3 * C) + BRANCH * C + k[:, None])
        acc = dot(a, b, acc, UPCAST)
    return acc


@triton.jit
def vote_kernel(
    u_pointwise_ptr, u_ordinary_ptr, u_dilated_ptr,  # [B,H,W,C]
    weight_ptr,  # [C,3C]
    norm_ptr,  # [3 or 5,3C]; None without NORM_INPUT
    bias_ptr,  # [C]; None with GATE
    vote_norm_ptr,  # [3 or 5,C]; None without GATE
    x_ptr,  # [B,H,W,C]; None without GATE
    out_ptr,  # [B,H,W,C]
    partial_ptr,  # [tiles,2,C]; None with GATE
    counts_ptr,  # [tiles]; None with GATE
    pixels,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM_INPUT: tl.constexpr,
    GATE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The vote convolution `weight` [C,3C] over the branches [pixels,C]; NORM_INPUT first applies norm [.,3C] and ReLU.

    GATE: out = y, from `vote_norm` [.,C] and `x`. Otherwise out = v with `bias` [C], and its moments are stored.
    """
    tile, n = tile_and_channels(C, BN)
    first, row, valid = pixel_block(tile, pixels, BM)
    acc = tl.zeros((BM, BN), ACC)
    base = first * C
    acc = accumulate_branch_votes(
        acc, u_pointwise_ptr + base, weight_ptr, norm_ptr, valid, row, n, C, 0, BK, NORM_INPUT, UPCAST
    )
    acc = accumulate_branch_votes(
        acc, u_ordinary_ptr + base, weight_ptr, norm_ptr, valid, row, n, C, 1, BK, NORM_INPUT, UPCAST
    )
    acc = accumulate_branch_votes(
        acc, u_dilated_ptr + base, weight_ptr, norm_ptr, valid, row, n, C, 2, BK, NORM_INPUT, UPCAST
    )
    offsets = row[:, None] * C + n[None, :]
    if GATE:
        skip = tl.load(x_ptr + base + offsets, mask=valid[:, None], other=0.0).to(ACC)
        value = apply_gate(skip, acc, vote_norm_ptr, n, C).to(out_ptr.dtype.element_ty)
    else:
        value = (acc + tl.load(bias_ptr + n).to(ACC)[None, :]).to(out_ptr.dtype.element_ty)
        store_moments(value.to(ACC), valid, partial_ptr, counts_ptr, tile, n, C, tl.min(n, 0) == 0)
    tl.store(out_ptr + base + offsets, value, mask=valid[:, None])


@triton.jit
def gate_kernel(
    x_ptr, v_ptr,  # [B,H,W,C]
    norm_ptr,  # [5,C]
    y_ptr,  # [B,H,W,C]
    pixels,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = x + x * sigmoid(norm(v)), all [pixels, C]."""
    first, row, valid = pixel_block(tl.program_id(0), pixels, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    offsets = row[:, None] * C + c[None, :]
    skip = tl.load(x_ptr + first * C + offsets, mask=valid[:, None], other=0.0).to(ACC)
    v_value = tl.load(v_ptr + first * C + offsets, mask=valid[:, None], other=0.0).to(ACC)
    value = apply_gate(skip, v_value, norm_ptr, c, C)
    tl.store(y_ptr + first * C + offsets, value.to(y_ptr.dtype.element_ty), mask=valid[:, None])
