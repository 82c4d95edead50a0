"""The multi-scale attention gate, backward: Triton kernels and their launches. `msag.py` registers the operator.

Saved from the forward are x, u, v and the two norm tables (5 tensors of x's size; eager saves about 9). The rest is
recomputed. With s = sigmoid(norm_v(v)), v̂ = (v - mean) / sigma, N pixels, and the same for each branch u_i:

    g   = dy x s (1 - s)                                         gradient w.r.t. norm_v(v)
    dv  = gamma / sigma (g - sum(g) / N - v̂ sum(g v̂) / N)
    g_i = [norm_i(u_i) > 0] W_i' dv                              gradient w.r.t. norm_i(u_i)
    du_i like dv, from g_i and û_i
    dx  = dy (1 + s) + sum_i conv_i'(du_i)

The backward of a norm needs two sums over all pixels first, so there are three steps: the sums of g, then dv; the
vote's gradient with the sums of g_i, then du (in place of g); then dx in one kernel with one accumulator for all 19
taps. The sums are also the gradients of gamma and beta. A bias before a batch-statistics norm has zero gradient. Sums
over tiles and over the splits of the vote's weight gradient are added in a fixed order. The branches' weight gradients
come from the convolution library, which is near peak there; they are bit-reproducible with
torch.backends.cudnn.deterministic.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.compile_spec import CompileSpec
from mgcc_dist.kernels.msag_tile import (
    TileConfig,
    accumulator_type,
    apply_norm,
    convolution_tiles,
    convolve,
    count_tiles,
    dot,
    elementwise_block,
    gate_pixels,
    make_compile_spec,
    needs_upcast,
    pixel_block,
    statistics_dtype,
    tile_and_channels,
    tile_pixels,
    vote_tiles,
    weight_tiles,
)
from mgcc_dist.kernels.targets import device_target

TARGET_PROGRAMS = 264  # two per multiprocessor of an H100
BRANCH_CONVOLUTIONS = ((1, 1), (3, 1), (3, 2))  # size and dilation: pointwise, ordinary, dilated


@triton.jit
def standardize(value, norm, c, CHANNELS: tl.constexpr):
    """Return (value - mean) / sigma of value [pixels, c], with table `norm` [5, CHANNELS]."""
    return (value - tl.load(norm + c)[None, :]) * tl.load(norm + 3 * CHANNELS + c)[None, :]


@triton.jit
def norm_backward(gradient, x_hat, norm, sums, c, pixels, CHANNELS: tl.constexpr):
    """Return the gradient w.r.t. a norm's input. `sums` [2, CHANNELS] are those of the gradient d and of d * x_hat."""
    mean = tl.load(sums + c) / pixels
    slope = tl.load(sums + CHANNELS + c) / pixels
    scale = tl.load(norm + CHANNELS + c)
    return (gradient - mean[None, :] - x_hat * slope[None, :]) * scale[None, :]


@triton.jit
def store_gradient_sums(gradient, x_hat, partial, tile, c, CHANNELS: tl.constexpr):
    """Store a tile's sums of the gradient and of gradient * x_hat; invalid pixels must have zero gradient."""
    tl.store(partial + tile * (2 * CHANNELS) + c, tl.sum(gradient, 0))
    tl.store(partial + tile * (2 * CHANNELS) + CHANNELS + c, tl.sum(gradient * x_hat, 0))


@triton.jit
def gate_backward(x, v, dy, norm, offsets, valid, c, C: tl.constexpr, ACC: tl.constexpr):
    """Return the gradient w.r.t. norm(v), zero where not valid, and the standardized v."""
    v_value = tl.load(v + offsets, mask=valid, other=0.0).to(ACC)
    grad_y = tl.load(dy + offsets, mask=valid, other=0.0).to(ACC)
    skip = tl.load(x + offsets, mask=valid, other=0.0).to(ACC)
    attention = tl.sigmoid(apply_norm(v_value, norm, c, C))
    return grad_y * skip * attention * (1.0 - attention), standardize(v_value, norm, c, C)


@triton.jit
def gate_gradient_sums(
    x, v, dy, norm, partial, pixels, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr
):
    """partial [tiles, 2, C] = each tile's sums of the gradient w.r.t. norm(v), and of that times standardized v."""
    first, row, valid = pixel_block(tl.program_id(0), pixels, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    base = first * C
    offsets = row[:, None] * C + c[None, :]
    gradient, x_hat = gate_backward(x + base, v + base, dy + base, norm, offsets, valid[:, None], c, C, ACC)
    store_gradient_sums(gradient, x_hat, partial, tl.program_id(0), c, C)


@triton.jit
def gate_gradient(
    x, v, dy, norm, sums, dv, pixels, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr
):
    """dv [pixels, C] = the gradient w.r.t. v."""
    first, row, valid = pixel_block(tl.program_id(0), pixels, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    base = first * C
    offsets = row[:, None] * C + c[None, :]
    gradient, x_hat = gate_backward(x + base, v + base, dy + base, norm, offsets, valid[:, None], c, C, ACC)
    value = norm_backward(gradient, x_hat, norm, sums, c, pixels, C)
    tl.store(dv + base + offsets, value.to(dv.dtype.element_ty), mask=valid[:, None])


@triton.jit
def vote_gradient(
    dv, w_vote, u, norm, g, partial, pixels, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """g [3,pixels,C] = the gradient w.r.t. the branches' norms; partial [tiles, 2, 3C] = its sums per tile."""
    blocks: tl.constexpr = C // BN
    tile = tl.program_id(0) // (3 * blocks)
    block = tl.program_id(0) % (3 * blocks)
    branch = block // blocks
    n = block % blocks * BN + tl.arange(0, BN)
    c = branch * C + n
    first, row, valid = pixel_block(tile, pixels, BM)
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, C, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(dv + first * C + row[:, None] * C + k[None, :], mask=valid[:, None], other=0.0)
        acc = dot(a, tl.load(w_vote + k[:, None] * (3 * C) + c[None, :]), acc, UPCAST)
    base = (branch.to(tl.int64) * pixels + first) * C
    offsets = row[:, None] * C + n[None, :]
    branch_value = tl.load(u + base + offsets, mask=valid[:, None], other=0.0).to(ACC)
    relu_active = valid[:, None] & (apply_norm(branch_value, norm, c, 3 * C) > 0.0)
    value = tl.where(relu_active, acc, 0.0).to(g.dtype.element_ty)
    store_gradient_sums(value.to(ACC), standardize(branch_value, norm, c, 3 * C), partial, tile, c, 3 * C)
    tl.store(g + base + offsets, value, mask=valid[:, None])


@triton.jit
def branch_gradient(g, u, norm, sums, pixels, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """Replace g [3,pixels,C] by du, the gradient w.r.t. the branch convolutions' outputs."""
    blocks: tl.constexpr = C // BC
    branch = tl.program_id(1) // blocks
    n = tl.program_id(1) % blocks * BC + tl.arange(0, BC)
    c = branch * C + n
    first, row, valid = pixel_block(tl.program_id(0), pixels, BM)
    base = (branch.to(tl.int64) * pixels + first) * C
    offsets = row[:, None] * C + n[None, :]
    gradient = tl.load(g + base + offsets, mask=valid[:, None], other=0.0).to(ACC)
    branch_value = tl.load(u + base + offsets, mask=valid[:, None], other=0.0).to(ACC)
    value = norm_backward(gradient, standardize(branch_value, norm, c, 3 * C), norm, sums, c, pixels, 3 * C)
    tl.store(g + base + offsets, value.to(g.dtype.element_ty), mask=valid[:, None])


@triton.jit
def input_gradient(
    du, w_pointwise, w_ordinary, w_dilated, dy, v, norm, dx, H, W, pixels,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dx [B,H,W,C] = the three transposed convolutions of du [3,B,H,W,C] + dy (1 + sigmoid(norm(v)))."""
    tile, n = tile_and_channels(C, BN)
    image, h, w = tile_pixels(tile, H, W, TH, TW)
    plane = image * (H * W * C)
    branch = tl.full((), C, tl.int64) * pixels
    du += plane
    acc = tl.zeros((TH * TW, BN), ACC)
    acc = convolve(acc, du, w_pointwise, h, w, n, H, W, C, 1, 1, BK, True, UPCAST)
    acc = convolve(acc, du + branch, w_ordinary, h, w, n, H, W, C, 3, 1, BK, True, UPCAST)
    acc = convolve(acc, du + 2 * branch, w_dilated, h, w, n, H, W, C, 3, 2, BK, True, UPCAST)
    offsets = (h * W + w)[:, None] * C + n[None, :]
    valid = ((h < H) & (w < W))[:, None]
    v_value = tl.load(v + plane + offsets, mask=valid, other=0.0).to(ACC)
    grad_y = tl.load(dy + plane + offsets, mask=valid, other=0.0).to(ACC)
    acc += grad_y * (1.0 + tl.sigmoid(apply_norm(v_value, norm, n, C)))
    tl.store(dx + plane + offsets, acc.to(dx.dtype.element_ty), mask=valid)


@triton.jit
def vote_weight_gradient(
    dv, u, norm, partial, pixels, pixels_per_split,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial [splits, C, 3C] = dv' relu(norm(u)) over each split's `pixels_per_split` pixels, a multiple of BK."""
    split = tl.program_id(1)
    columns: tl.constexpr = C // BN
    m = tl.program_id(0) // (3 * columns) * BM + tl.arange(0, BM)
    block = tl.program_id(0) % (3 * columns)
    branch = block // columns
    n = block % columns * BN + tl.arange(0, BN)
    c = branch * C + n
    first = split.to(tl.int64) * pixels_per_split
    dv += first * C
    u += (branch.to(tl.int64) * pixels + first) * C
    remaining = pixels - first
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, pixels_per_split, BK):
        row = start + tl.arange(0, BK)
        valid = (row < remaining)[:, None]
        a = tl.load(dv + row[:, None] * C + m[None, :], mask=valid, other=0.0)
        b = tl.load(u + row[:, None] * C + n[None, :], mask=valid, other=0.0)
        b = tl.maximum(apply_norm(b.to(ACC), norm, c, 3 * C), 0.0).to(b.dtype)
        acc = dot(tl.trans(a), b, acc, UPCAST)
    partial += split.to(tl.int64) * (3 * C * C)
    tl.store(partial + m[:, None] * (3 * C) + c[None, :], acc)


def split_pixels(channels: int, pixels: int, tiles: TileConfig) -> tuple[int, int]:
    """Return the number of programs per weight block and the pixels per program."""
    blocks = (channels // tiles.tile_w) * (3 * channels // tiles.block_n)
    wanted = triton.cdiv(TARGET_PROGRAMS, blocks)
    pixels_per_split = triton.cdiv(triton.cdiv(pixels, wanted), tiles.block_k) * tiles.block_k
    return triton.cdiv(pixels, pixels_per_split), pixels_per_split


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
    """Return the gradients of x, the branch weights, the vote weight [C,3C,1,1], all gammas [4C] and all betas [4C].

    dy, x and v are [B,C,H,W] channels-last, u is [3,B,H,W,C], and the norm tables are those of `train_forward`.
    """
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    types = {"ACC": accumulator_type(x.dtype)}
    product_types = types | {"UPCAST": needs_upcast(x.dtype)}
    sums_dtype = statistics_dtype(x.dtype)

    block_pixels, block = elementwise_block(channels)
    grid = (triton.cdiv(pixels, block_pixels), channels // block)
    elementwise = types | {"C": channels, "BM": block_pixels, "BC": block, "num_warps": 8}
    partial = x.new_empty(grid[0], 2, channels, dtype=sums_dtype)
    gate_gradient_sums[grid](x, v, dy, vote_norm, partial, pixels, **elementwise)
    vote_sums = partial.sum(0)
    dv = torch.empty_like(x)
    gate_gradient[grid](x, v, dy, vote_norm, vote_sums, dv, pixels, **elementwise)

    tiles = vote_tiles(channels, x.dtype, device_target(x.device))
    count = triton.cdiv(pixels, tiles.pixels)
    du = torch.empty_like(u)
    partial = x.new_empty(count, 2, 3 * channels, dtype=sums_dtype)
    vote_gradient[(count * (3 * channels // tiles.block_n),)](
        dv, w_vote, u, norm, du, partial, pixels,
        C=channels, BM=tiles.pixels, BN=tiles.block_n, BK=tiles.block_k, **product_types, **tiles.options(),
    )  # fmt: skip
    sums = partial.sum(0)
    branch_gradient[(grid[0], 3 * grid[1])](du, u, norm, sums, pixels, **elementwise)

    tiles = convolution_tiles(channels, x.dtype, device_target(x.device))
    dx = torch.empty_like(x)
    input_gradient[(count_tiles(x, tiles) * (channels // tiles.block_n),)](
        du, *weights, dy, v, vote_norm, dx, height, width, pixels,
        C=channels, TH=tiles.tile_h, TW=tiles.tile_w, BN=tiles.block_n, BK=tiles.block_k, **product_types,
        **tiles.options(),
    )  # fmt: skip

    tiles = weight_tiles(channels, x.dtype)
    splits, pixels_per_split = split_pixels(channels, pixels, tiles)
    partial = x.new_empty(splits, channels, 3 * channels, dtype=sums_dtype)
    blocks = (channels // tiles.tile_w) * (3 * channels // tiles.block_n)
    vote_weight_gradient[(blocks, splits)](
        dv, u, norm, partial, pixels, pixels_per_split,
        C=channels, BM=tiles.tile_w, BN=tiles.block_n, BK=tiles.block_k, **product_types, **tiles.options(),
    )  # fmt: skip
    dw_vote = partial.sum(0).to(x.dtype).view_as(w_vote)

    dweights = [
        torch.ops.aten.convolution_backward(
            branch.permute(0, 3, 1, 2), x, weight, None, [1, 1], [dilation * (size // 2)] * 2, [dilation] * 2,
            False, [0, 0], 1, [False, True, False],
        )[1]
        for branch, weight, (size, dilation) in zip(du, weights, BRANCH_CONVOLUTIONS, strict=True)
    ]  # fmt: skip
    dbetas, dgammas = (torch.cat([sums[row], vote_sums[row]]) for row in (0, 1))
    return dx, dweights, dw_vote, dgammas, dbetas


def compile_specs(channels: int, target: str) -> list[CompileSpec]:
    """Specs for all backward kernels."""
    shared = {"C": channels, "ACC": tl.float32}
    pixels, block = elementwise_block(channels)
    elementwise, warps = shared | {"BM": pixels, "BC": block}, {"num_warps": 8}
    found = [
        make_compile_spec(name, kernel, channels, elementwise, warps, tensor_cores=False)
        for name, kernel in (
            ("gate gradient sums", gate_gradient_sums),
            ("gate gradient", gate_gradient),
            ("branch gradient", branch_gradient),
        )
    ]
    tiles = vote_tiles(channels, torch.bfloat16, target)
    blocks = shared | {"BM": tiles.pixels, "BN": tiles.block_n, "BK": tiles.block_k, "UPCAST": False}
    found.append(make_compile_spec("vote gradient", vote_gradient, channels, blocks, tiles.options()))
    tiles = convolution_tiles(channels, torch.bfloat16, target)
    blocks = shared | {
        "TH": tiles.tile_h,
        "TW": tiles.tile_w,
        "BN": tiles.block_n,
        "BK": tiles.block_k,
        "UPCAST": False,
    }
    found.append(make_compile_spec("input gradient", input_gradient, channels, blocks, tiles.options()))
    tiles = weight_tiles(channels, torch.bfloat16)
    blocks = shared | {"BM": tiles.tile_w, "BN": tiles.block_n, "BK": tiles.block_k, "UPCAST": False}
    pixels_per_split = split_pixels(channels, gate_pixels(channels)[1], tiles)[1]
    name = "vote weight gradient"
    found.append(
        make_compile_spec(
            name, vote_weight_gradient, channels, blocks, tiles.options(), pixels_per_split=pixels_per_split
        )
    )
    return found
