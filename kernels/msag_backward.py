"""The multi-scale attention gate, backward: its Triton kernels and their launches. `msag.py` makes an operator of them.

Kept from the forward are x, u, v and the two norms (5 tensors of x's size; eager keeps about 9); the rest is computed
again. With s = sigmoid(norm_v(v)), v̂ = (v - mean) / sigma, N pixels, and the same for each branch u_i:

    g   = dy x s (1 - s)                                         gradient to norm_v(v)
    dv  = gamma / sigma (g - sum(g) / N - v̂ sum(g v̂) / N)
    g_i = [norm_i(u_i) > 0] W_i' dv                              gradient to norm_i(u_i)
    du_i as dv, from g_i and û_i
    dx  = dy (1 + s) + sum_i conv_i'(du_i)

A norm's backward waits for two sums over all pixels, so there are three steps: sums of g -> dv, then the vote's
gradient with the sums of g_i -> du (in place of g), then dx in one kernel with one accumulator over all 19 taps. The
sums are gamma's and beta's gradients. A bias before a norm of the batch has none. Sums over tiles and over the splits
of the vote's weight gradient are added in a fixed order. The branches' weight gradients are the library's, which runs
near peak there; whether those repeat bit by bit is torch.backends.cudnn.deterministic's affair.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.case import Case
from mgcc_dist.kernels.msag_tile import (
    Tiles,
    accumulator,
    convolution_tiles,
    convolve,
    dot,
    gate_pixels,
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
    weight_tiles,
)
from mgcc_dist.kernels.targets import target_of

PROGRAMS = 264  # two for each of an H100's 132 multiprocessors
CONVOLUTIONS = ((1, 1), (3, 1), (3, 2))  # size and dilation: pointwise, ordinary, dilated


@triton.jit
def standardized(value, norm, c, CHANNELS: tl.constexpr):
    """(value - mean) / sigma of value [pixels, c] by table `norm` [5, CHANNELS]."""
    return (value - tl.load(norm + c)[None, :]) * tl.load(norm + 3 * CHANNELS + c)[None, :]


@triton.jit
def through_norm(gradient, standard, norm, sums, c, pixels, CHANNELS: tl.constexpr):
    """The gradient to a norm's input from that to its output; `sums` [2, CHANNELS] of it, and of it times standard."""
    mean = tl.load(sums + c) / pixels
    slope = tl.load(sums + CHANNELS + c) / pixels
    scale = tl.load(norm + CHANNELS + c)
    return (gradient - mean[None, :] - standard * slope[None, :]) * scale[None, :]


@triton.jit
def store_sums(gradient, standard, partial, tile, c, CHANNELS: tl.constexpr):
    """Of gradients that are 0 outside the tensor."""
    tl.store(partial + tile * (2 * CHANNELS) + c, tl.sum(gradient, 0))
    tl.store(partial + tile * (2 * CHANNELS) + CHANNELS + c, tl.sum(gradient * standard, 0))


@triton.jit
def through_gate(x, v, dy, norm, place, valid, c, C: tl.constexpr, ACC: tl.constexpr):
    """Gradient to norm(v), and standardized v, at `place`; the gradient is 0 where not valid."""
    voted = tl.load(v + place, mask=valid, other=0.0).to(ACC)
    upstream = tl.load(dy + place, mask=valid, other=0.0).to(ACC)
    skip = tl.load(x + place, mask=valid, other=0.0).to(ACC)
    share = tl.sigmoid(normalized(voted, norm, c, C))
    return upstream * skip * share * (1.0 - share), standardized(voted, norm, c, C)


@triton.jit
def gate_sums(x, v, dy, norm, partial, pixels, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """partial [tiles, 2, C]: of each tile, the sums of the gradient to norm(v), and of it times standardized v."""
    first, row, valid = strip_of_pixels(tl.program_id(0), pixels, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    base = first * C
    place = row[:, None] * C + c[None, :]
    gradient, standard = through_gate(x + base, v + base, dy + base, norm, place, valid[:, None], c, C, ACC)
    store_sums(gradient, standard, partial, tl.program_id(0), c, C)


@triton.jit
def gate_gradient(
    x, v, dy, norm, sums, dv, pixels, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr
):
    """dv [pixels, C]."""
    first, row, valid = strip_of_pixels(tl.program_id(0), pixels, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    base = first * C
    place = row[:, None] * C + c[None, :]
    gradient, standard = through_gate(x + base, v + base, dy + base, norm, place, valid[:, None], c, C, ACC)
    value = through_norm(gradient, standard, norm, sums, c, pixels, C)
    tl.store(dv + base + place, value.to(dv.dtype.element_ty), mask=valid[:, None])


@triton.jit
def vote_gradient(
    dv, w_vote, u, norm, g, partial, pixels, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """g [3,pixels,C], the gradient to the branches' norms, and its sums by tile, partial [tiles, 2, 3C]."""
    blocks: tl.constexpr = C // BN
    tile = tl.program_id(0) // (3 * blocks)
    block = tl.program_id(0) % (3 * blocks)
    branch = block // blocks
    n = block % blocks * BN + tl.arange(0, BN)
    c = branch * C + n
    first, row, valid = strip_of_pixels(tile, pixels, BM)
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, C, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(dv + first * C + row[:, None] * C + k[None, :], mask=valid[:, None], other=0.0)
        acc = dot(a, tl.load(w_vote + k[:, None] * (3 * C) + c[None, :]), acc, UPCAST)
    base = (branch.to(tl.int64) * pixels + first) * C
    place = row[:, None] * C + n[None, :]
    scale = tl.load(u + base + place, mask=valid[:, None], other=0.0).to(ACC)
    open_ = valid[:, None] & (normalized(scale, norm, c, 3 * C) > 0.0)
    value = tl.where(open_, acc, 0.0).to(g.dtype.element_ty)
    store_sums(value.to(ACC), standardized(scale, norm, c, 3 * C), partial, tile, c, 3 * C)
    tl.store(g + base + place, value, mask=valid[:, None])


@triton.jit
def scales_gradient(g, u, norm, sums, pixels, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """g [3,pixels,C] becomes du."""
    blocks: tl.constexpr = C // BC
    branch = tl.program_id(1) // blocks
    n = tl.program_id(1) % blocks * BC + tl.arange(0, BC)
    c = branch * C + n
    first, row, valid = strip_of_pixels(tl.program_id(0), pixels, BM)
    base = (branch.to(tl.int64) * pixels + first) * C
    place = row[:, None] * C + n[None, :]
    gradient = tl.load(g + base + place, mask=valid[:, None], other=0.0).to(ACC)
    scale = tl.load(u + base + place, mask=valid[:, None], other=0.0).to(ACC)
    value = through_norm(gradient, standardized(scale, norm, c, 3 * C), norm, sums, c, pixels, 3 * C)
    tl.store(g + base + place, value.to(g.dtype.element_ty), mask=valid[:, None])


@triton.jit
def input_gradient(
    du, w_pointwise, w_ordinary, w_dilated, dy, v, norm, dx, H, W, pixels,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dx [B,H,W,C] = the three transposed convolutions of du [3,B,H,W,C] + dy (1 + sigmoid(norm(v)))."""
    tile, n = tile_and_channels(C, BN)
    image, h, w = pixels_of_tile(tile, H, W, TH, TW)
    plane = image * (H * W * C)
    branch = tl.full((), C, tl.int64) * pixels
    du += plane
    acc = tl.zeros((TH * TW, BN), ACC)
    acc = convolve(acc, du, w_pointwise, h, w, n, H, W, C, 1, 1, BK, True, UPCAST)
    acc = convolve(acc, du + branch, w_ordinary, h, w, n, H, W, C, 3, 1, BK, True, UPCAST)
    acc = convolve(acc, du + 2 * branch, w_dilated, h, w, n, H, W, C, 3, 2, BK, True, UPCAST)
    place = (h * W + w)[:, None] * C + n[None, :]
    valid = ((h < H) & (w < W))[:, None]
    voted = tl.load(v + plane + place, mask=valid, other=0.0).to(ACC)
    upstream = tl.load(dy + plane + place, mask=valid, other=0.0).to(ACC)
    acc += upstream * (1.0 + tl.sigmoid(normalized(voted, norm, n, C)))
    tl.store(dx + plane + place, acc.to(dx.dtype.element_ty), mask=valid)


@triton.jit
def vote_weight_gradient(
    dv, u, norm, partial, pixels, share, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial [splits, C, 3C] = dv' relu(norm(u)) of the split's `share` of pixels, a multiple of BK."""
    split = tl.program_id(1)
    columns: tl.constexpr = C // BN
    m = tl.program_id(0) // (3 * columns) * BM + tl.arange(0, BM)
    block = tl.program_id(0) % (3 * columns)
    branch = block // columns
    n = block % columns * BN + tl.arange(0, BN)
    c = branch * C + n
    first = split.to(tl.int64) * share
    dv += first * C
    u += (branch.to(tl.int64) * pixels + first) * C
    left = pixels - first
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, share, BK):
        row = start + tl.arange(0, BK)
        valid = (row < left)[:, None]
        a = tl.load(dv + row[:, None] * C + m[None, :], mask=valid, other=0.0)
        b = tl.load(u + row[:, None] * C + n[None, :], mask=valid, other=0.0)
        b = tl.maximum(normalized(b.to(ACC), norm, c, 3 * C), 0.0).to(b.dtype)
        acc = dot(tl.trans(a), b, acc, UPCAST)
    partial += split.to(tl.int64) * (3 * C * C)
    tl.store(partial + m[:, None] * (3 * C) + c[None, :], acc)


def splits_of(channels: int, pixels: int, tiles: Tiles) -> tuple[int, int]:
    """How many programs share the pixels of one block of the vote's weight, and how many pixels each takes."""
    blocks = (channels // tiles.columns) * (3 * channels // tiles.out)
    wanted = triton.cdiv(PROGRAMS, blocks)
    share = triton.cdiv(triton.cdiv(pixels, wanted), tiles.depth) * tiles.depth
    return triton.cdiv(pixels, share), share


def backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    w_vote: Tensor,
    u: Tensor,
    v: Tensor,
    norm: Tensor,
    vote_norm: Tensor,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients to x, the branches' weights, the vote's weight [C,3C,1,1], and all gammas and betas [4C].

    dy, x and v are [B,C,H,W], channels-last; u [3,B,H,W,C]; the norms those of `msag_forward.train`.
    """
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    types = {"ACC": accumulator(x.dtype)}
    product_types = types | {"UPCAST": upcast(x.dtype)}
    sums_dtype = statistics_dtype(x.dtype)

    rows, block = strip(channels)
    strips = (triton.cdiv(pixels, rows), channels // block)
    elementwise = types | {"C": channels, "BM": rows, "BC": block, "num_warps": 8}
    partial = x.new_empty(strips[0], 2, channels, dtype=sums_dtype)
    gate_sums[strips](x, v, dy, vote_norm, partial, pixels, **elementwise)
    vote_sums = partial.sum(0)
    dv = torch.empty_like(x)
    gate_gradient[strips](x, v, dy, vote_norm, vote_sums, dv, pixels, **elementwise)

    tiles = vote_tiles(channels, x.dtype, target_of(x.device))
    count = triton.cdiv(pixels, tiles.pixels)
    du = torch.empty_like(u)
    partial = x.new_empty(count, 2, 3 * channels, dtype=sums_dtype)
    vote_gradient[(count * (3 * channels // tiles.out),)](
        dv, w_vote, u, norm, du, partial, pixels,
        C=channels, BM=tiles.pixels, BN=tiles.out, BK=tiles.depth, **product_types, **tiles.options(),
    )  # fmt: skip
    sums = partial.sum(0)
    scales_gradient[(strips[0], 3 * strips[1])](du, u, norm, sums, pixels, **elementwise)

    tiles = convolution_tiles(channels, x.dtype, target_of(x.device))
    dx = torch.empty_like(x)
    input_gradient[(plane_tiles(x, tiles) * (channels // tiles.out),)](
        du, *weights, dy, v, vote_norm, dx, height, width, pixels,
        C=channels, TH=tiles.rows, TW=tiles.columns, BN=tiles.out, BK=tiles.depth, **product_types, **tiles.options(),
    )  # fmt: skip

    tiles = weight_tiles(channels, x.dtype)
    splits, share = splits_of(channels, pixels, tiles)
    partial = x.new_empty(splits, channels, 3 * channels, dtype=sums_dtype)
    blocks = (channels // tiles.columns) * (3 * channels // tiles.out)
    vote_weight_gradient[(blocks, splits)](
        dv, u, norm, partial, pixels, share,
        C=channels, BM=tiles.columns, BN=tiles.out, BK=tiles.depth, **product_types, **tiles.options(),
    )  # fmt: skip
    dw_vote = partial.sum(0).to(x.dtype).view_as(w_vote)

    dweights = [
        torch.ops.aten.convolution_backward(
            branch.permute(0, 3, 1, 2), x, weight, None, [1, 1], [dilation * (size // 2)] * 2, [dilation] * 2,
            False, [0, 0], 1, [False, True, False],
        )[1]
        for branch, weight, (size, dilation) in zip(du, weights, CONVOLUTIONS, strict=True)
    ]  # fmt: skip
    dbetas, dgammas = (torch.cat([sums[row], vote_sums[row]]) for row in (0, 1))
    return dx, dweights, dw_vote, dgammas, dbetas


def cases(channels: int, target: str) -> list[Case]:
    number = {"C": channels, "ACC": tl.float32}
    pixels, block = strip(channels)
    strips, warps = number | {"BM": pixels, "BC": block}, {"num_warps": 8}
    found = [
        make_case(name, kernel, channels, strips, warps, tensor_cores=False)
        for name, kernel in (
            ("gate sums", gate_sums),
            ("gate gradient", gate_gradient),
            ("scales gradient", scales_gradient),
        )
    ]
    tiles = vote_tiles(channels, torch.bfloat16, target)
    blocks = number | {"BM": tiles.pixels, "BN": tiles.out, "BK": tiles.depth, "UPCAST": False}
    found.append(make_case("vote gradient", vote_gradient, channels, blocks, tiles.options()))
    tiles = convolution_tiles(channels, torch.bfloat16, target)
    blocks = number | {"TH": tiles.rows, "TW": tiles.columns, "BN": tiles.out, "BK": tiles.depth, "UPCAST": False}
    found.append(make_case("input gradient", input_gradient, channels, blocks, tiles.options()))
    tiles = weight_tiles(channels, torch.bfloat16)
    blocks = number | {"BM": tiles.columns, "BN": tiles.out, "BK": tiles.depth, "UPCAST": False}
    share = splits_of(channels, gate_pixels(channels)[1], tiles)[1]
    name = "vote weight gradient"
    found.append(make_case(name, vote_weight_gradient, channels, blocks, tiles.options(), share=share))
    return found
