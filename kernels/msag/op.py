"""The gate in PyTorch's terms: kernel launches, custom operators, and their autograd."""

# mypy: disallow-untyped-defs=False

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from ..launch import accumulator_type, needs_upcast, statistics_dtype
from ..targets import device_target
from .kernels_backward import (
    branch_gradient,
    gate_gradient,
    gate_gradient_sums,
    input_gradient,
    vote_gradient,
    vote_weight_gradient,
)
from .kernels_evaluation import single_kernel_gate
from .kernels_forward import branch_convolutions, gate_kernel, merge_moments, vote_kernel
from .tiles import (
    EVALUATION_IMPLEMENTATIONS,
    TileConfig,
    convolution_tiles,
    elementwise_block,
    evaluation_tiles,
    power_of_two_divisor,
    single_kernel_channels,
    vote_gradient_tiles,
    vote_tiles,
    weight_tiles,
)

TARGET_PROGRAMS = 264  # two per multiprocessor of an H100
BRANCH_CONVOLUTIONS = ((1, 1), (3, 1), (3, 2))  # size and dilation: pointwise, ordinary, dilated


def count_tiles(x: Tensor, tiles: TileConfig) -> int:
    """Return the number of tile_h x tile_w tiles over all images of x."""
    batch, _, height, width = x.shape
    return batch * triton.cdiv(height, tiles.tile_h) * triton.cdiv(width, tiles.tile_w)


# Forward with batch statistics.


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


# Evaluation.


def evaluate(
    x: Tensor, weights: list[Tensor], w_vote: Tensor, norm: Tensor, vote_norm: Tensor, implementation: str
) -> Tensor:
    """Run the gate with running statistics on x [B,C,H,W], channels-last, with norm tables [3,3C] and [3,C].

    single_kernel: everything in one kernel, for the channels in `single_kernel_channels`
    two_kernels: the convolutions with norm and ReLU, then the vote with the gate
    aten_convolutions: ATen's convolutions, then norm, ReLU, vote and gate in one kernel
    auto: single_kernel where supported, else two_kernels
    """
    _, channels, height, width = x.shape
    if implementation == "auto":  # by the roofline: keep u out of memory while its tile fits in registers
        implementation = (
            "single_kernel" if channels in single_kernel_channels(device_target(x.device)) else "two_kernels"
        )
    if implementation == "single_kernel":
        tiles = evaluation_tiles(channels, x.dtype, device_target(x.device))
        y = torch.empty_like(x)
        single_kernel_gate[(count_tiles(x, tiles),)](
            x, *weights, w_vote, norm, vote_norm, y, height, width,
            C=channels, TH=tiles.tile_h, TW=tiles.tile_w, BN=tiles.block_n, BK=tiles.block_k,
            ACC=accumulator_type(x.dtype), UPCAST=needs_upcast(x.dtype), **tiles.options(),
        )  # fmt: skip
        return y
    if implementation == "two_kernels":
        u, _, _ = launch_branch_convolutions(x, weights, norm=norm)
        return launch_vote(list(u), w_vote, x, vote_norm=vote_norm)[0]
    if implementation == "aten_convolutions":
        branches = [
            F.conv2d(x, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
            for weight, dilation in zip(weights, (1, 1, 2), strict=True)
        ]
        u = [branch.contiguous(memory_format=torch.channels_last) for branch in branches]
        return launch_vote(u, w_vote, x, norm=norm, vote_norm=vote_norm)[0]
    raise ValueError(
        f"unknown gate implementation {implementation!r}. Choose from {', '.join(EVALUATION_IMPLEMENTATIONS)}"
    )


# Backward.


def pixel_stride(x: Tensor) -> int | None:
    """Return the distance of adjacent pixels of x [B,C,H,W], whose channels are adjacent and pixels evenly spaced.

    None for other layouts, and where an image needs 64-bit offsets.
    """
    _, channels, height, width = x.shape
    counts = 1, width, width * height  # pixels from one pixel, row and image to the next
    distances = [(x.stride(dim), count) for dim, count in zip((3, 2, 0), counts, strict=True) if x.shape[dim] > 1]
    stride = distances[0][0] // distances[0][1] if distances else channels
    if x.stride(1) != 1 or any(distance != count * stride for distance, count in distances):
        return None
    if height * width * stride >= 2**31:
        return None
    return stride


def split_pixels(channels: int, pixels: int, tiles: TileConfig) -> tuple[int, int]:
    """Return the number of programs per weight block and the pixels per program."""
    blocks = (channels // tiles.tile_w) * (3 * channels // tiles.block_n)
    wanted = triton.cdiv(TARGET_PROGRAMS, blocks)
    pixels_per_split = triton.cdiv(triton.cdiv(pixels, wanted), tiles.block_k) * tiles.block_k
    return triton.cdiv(pixels, pixels_per_split), pixels_per_split


def train_backward(
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

    x and v are [B,C,H,W] channels-last, dy has a `pixel_stride`, u is [3,B,H,W,C], and the norm tables are those of
    `train_forward`.
    """
    dy_stride = pixel_stride(dy)
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    types = {"ACC": accumulator_type(x.dtype)}
    product_types = types | {"UPCAST": needs_upcast(x.dtype)}
    sums_dtype = statistics_dtype(x.dtype)

    block_pixels, block = elementwise_block(channels)
    grid = (triton.cdiv(pixels, block_pixels), channels // block)
    elementwise = types | {"C": channels, "BM": block_pixels, "BC": block, "num_warps": 8}
    partial = x.new_empty(grid[0], 2, channels, dtype=sums_dtype)
    gate_gradient_sums[grid](x, v, dy, vote_norm, partial, pixels, dy_stride, **elementwise)
    vote_sums = partial.sum(0)
    dv = torch.empty_like(x)
    gate_gradient[grid](x, v, dy, vote_norm, vote_sums, dv, pixels, dy_stride, **elementwise)

    tiles = vote_gradient_tiles(channels, x.dtype, device_target(x.device))
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
        du, *weights, dy, v, vote_norm, dx, height, width, pixels, dy_stride,
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


# Operators.


@torch.library.custom_op("mgcc_dist::msag_evaluate", mutates_args=())
def msag_evaluate(
    x: Tensor, weights: list[Tensor], w_vote: Tensor, norm: Tensor, vote_norm: Tensor, implementation: str
) -> Tensor:
    """The gate with running statistics; see `evaluate`."""
    return evaluate(x, weights, w_vote, norm, vote_norm, implementation)


@msag_evaluate.register_fake
def _(x, weights, w_vote, norm, vote_norm, implementation):
    return torch.empty_like(x)


@torch.library.custom_op("mgcc_dist::msag_train", mutates_args=())
def msag_train(
    x: Tensor, weights: list[Tensor], w_vote: Tensor, biases: Tensor, gammas: Tensor, betas: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gate with batch statistics; see `train_forward`. Differentiable once, with respect to y only."""
    return train_forward(x, weights, w_vote, biases, gammas, betas, eps)


@msag_train.register_fake
def _(x, weights, w_vote, biases, gammas, betas, eps):
    batch, channels, height, width = x.shape
    norm = x.new_empty(5, 3 * channels, dtype=statistics_dtype(x.dtype))
    u = x.new_empty(3, batch, height, width, channels)
    return torch.empty_like(x), u, torch.empty_like(x), norm, norm.new_empty(5, channels)


@torch.library.custom_op("mgcc_dist::msag_backward", mutates_args=())
def msag_train_backward(
    dy: Tensor, x: Tensor, weights: list[Tensor], w_vote: Tensor, u: Tensor, v: Tensor, norm: Tensor, vote_norm: Tensor
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients of `msag_train`; see `train_backward`."""
    return train_backward(dy, x, weights, w_vote, u, v, norm, vote_norm)


@msag_train_backward.register_fake
def _(dy, x, weights, w_vote, u, v, norm, vote_norm):
    affine = norm.new_empty(4 * x.shape[1])
    dweights = [torch.empty_like(weight) for weight in weights]
    return torch.empty_like(x), dweights, torch.empty_like(w_vote), affine, torch.empty_like(affine)


def setup_context(ctx, inputs, output):
    x, weights, w_vote, biases, gammas, betas, _ = inputs
    _, u, v, norm, vote_norm = output
    ctx.save_for_backward(x, *weights, w_vote, u, v, norm, vote_norm)
    ctx.dtypes = biases.dtype, gammas.dtype, betas.dtype
    ctx.mark_non_differentiable(u, v, norm, vote_norm)
    ctx.set_materialize_grads(False)


def backward(ctx, dy, *_):
    if dy is None:
        return None, [None] * 3, None, None, None, None, None
    x, *weights, w_vote, u, v, norm, vote_norm = ctx.saved_tensors
    dy = dy.to(x.dtype)
    if pixel_stride(dy) is None:
        dy = dy.contiguous(memory_format=torch.channels_last)
    dx, dweights, dw_vote, dgammas, dbetas = msag_train_backward(dy, x, weights, w_vote, u, v, norm, vote_norm)
    bias_dtype, gamma_dtype, beta_dtype = ctx.dtypes
    return (
        dx,
        dweights,
        dw_vote,
        torch.zeros_like(dbetas, dtype=bias_dtype),
        dgammas.to(gamma_dtype),
        dbetas.to(beta_dtype),
        None,
    )


msag_train.register_autograd(backward, setup_context=setup_context)
