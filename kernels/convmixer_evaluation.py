"""The ConvMixer layer by running statistics, in two kernels: each norm is a scale and a shift of a channel.

y = x + BN(GELU(depthwise(x) + bias)), and then x' = BN(GELU(weight y + bias)), a matrix product over all images
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.case import Case
from mgcc_dist.kernels.convmixer_launch import HALVES, SHAPES, TILE, WIDE, make_case, plan, shape_of
from mgcc_dist.kernels.convmixer_tile import depthwise, elements, gelu, inner_planes, load, outer_planes, rows
from mgcc_dist.kernels.targets import INTERPRETED


@triton.jit
def depthwise_evaluation(
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, beta_ptr, mean_ptr, variance_ptr, y_ptr, eps, B, C,
    CHANNELS_OUTER: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y [C,B,H,W]; x is [C,B,H,W] if CHANNELS_OUTER, else [B,C,H,W]. Grid (C, groups of images)."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    c = tl.program_id(0)
    image, h, inside = rows(tl.program_id(1) * BB, B, H, BB)
    y_plane = outer_planes(c, image, B, H, W)
    y_at = elements(y_plane, h, W)
    if CHANNELS_OUTER:
        x_plane, x_at = y_plane, y_at
    else:
        x_plane = inner_planes(c, image, C, H, W)
        x_at = elements(x_plane, h, W)
    x = load(x_ptr, x_at, inside, ACC)
    activated = gelu(depthwise(x_ptr, x_plane, weight_ptr, bias_ptr, c, h, inside, H, W, K, BB, ACC, UPCAST))
    scale = tl.load(gamma_ptr + c).to(ACC) / tl.sqrt(tl.load(variance_ptr + c).to(ACC) + eps)
    shift = tl.load(beta_ptr + c).to(ACC) - tl.load(mean_ptr + c).to(ACC) * scale
    tl.store(y_ptr + y_at, activated * scale + shift + x, mask=inside[:, None])


@triton.jit
def pointwise_evaluation(
    y_ptr, weight_ptr, bias_ptr, gamma_ptr, beta_ptr, mean_ptr, variance_ptr, x_ptr, eps, C, N,
    CHANNELS_OUTER: tl.constexpr, HW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x from weight [C,C] and y [C,N], N = B H W; x is [C,B,H,W] if CHANNELS_OUTER, else [B,C,H,W].

    Grid (tiles of rows, tiles of columns): programs that run together share the columns of y.
    """
    ACC: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    accumulator = tl.zeros((BM, BN), ACC)
    for start in range(0, C, BK):
        weight_mask = (m < C)[:, None] & (start + k < C)[None, :]
        weight = tl.load(weight_ptr + m[:, None] * C + (start + k)[None, :], mask=weight_mask, other=0.0)
        y_mask = (start + k < C)[:, None] & (n < N)[None, :]
        y = tl.load(y_ptr + (start + k)[:, None] * N + n[None, :], mask=y_mask, other=0.0)
        if UPCAST:
            weight = weight.to(ACC)
            y = y.to(ACC)
        accumulator = tl.dot(weight, y, accumulator, input_precision="ieee", out_dtype=ACC)
    bias = tl.load(bias_ptr + m, mask=m < C, other=0.0).to(ACC)
    variance = tl.load(variance_ptr + m, mask=m < C, other=1.0).to(ACC)
    scale = tl.load(gamma_ptr + m, mask=m < C, other=0.0).to(ACC) / tl.sqrt(variance + eps)
    mean = tl.load(mean_ptr + m, mask=m < C, other=0.0).to(ACC)
    shift = tl.load(beta_ptr + m, mask=m < C, other=0.0).to(ACC) - mean * scale
    x = gelu(accumulator + bias[:, None]) * scale[:, None] + shift[:, None]
    columns = n if CHANNELS_OUTER else n // HW * C * HW + n % HW
    x_at = m[:, None] * (N if CHANNELS_OUTER else HW) + columns[None, :]
    tl.store(x_ptr + x_at, x, mask=(m < C)[:, None] & (n < N)[None, :])


@torch.library.custom_op("mgcc_dist::convmixer_evaluate", mutates_args=())
def evaluate(
    x: Tensor,
    depthwise: list[Tensor],
    depthwise_eps: float,
    pointwise: list[Tensor],
    pointwise_eps: float,
    channels_outer_in: bool,
    channels_outer_out: bool,
) -> Tensor:
    """One layer by its running statistics. x and the result are [B,C,H,W], or [C,B,H,W] where `channels_outer` says so.

    A list is weight, bias, gamma, beta, running mean and running variance; pointwise's weight has the type of x.
    """
    channels, batch, height, width = shape_of(x, channels_outer_in)
    launch = plan(batch, height, width, TILE)
    y = x.new_empty(channels, batch, height, width)
    depthwise_evaluation[(channels, triton.cdiv(batch, launch.images))](
        x, *depthwise, y, depthwise_eps, batch, channels, CHANNELS_OUTER=channels_outer_in,
        H=height, W=width, K=depthwise[0].shape[-1], BB=launch.images, UPCAST=INTERPRETED,
        num_warps=launch.num_warps, num_stages=2,
    )  # fmt: skip
    out = _new_output(x, channels_outer_in, channels_outer_out)
    columns = batch * height * width
    tile = 128 if columns * channels >= 128 * 128 * 100 else 64  # enough tiles to occupy a hundred processors
    pointwise_evaluation[(triton.cdiv(channels, tile), triton.cdiv(columns, tile))](
        y, *pointwise, out, pointwise_eps, channels, columns, CHANNELS_OUTER=channels_outer_out, HW=height * width,
        BM=tile, BN=tile, BK=64 if x.element_size() == 2 else 32, UPCAST=INTERPRETED,
        **_pointwise_options(tile),
    )  # fmt: skip
    return out


@evaluate.register_fake
def _(x, depthwise, depthwise_eps, pointwise, pointwise_eps, channels_outer_in, channels_outer_out):
    return _new_output(x, channels_outer_in, channels_outer_out)


def _new_output(x: Tensor, channels_outer_in: bool, channels_outer_out: bool) -> Tensor:
    channels, batch, height, width = shape_of(x, channels_outer_in)
    return x.new_empty((channels, batch, height, width) if channels_outer_out else (batch, channels, height, width))


def _pointwise_options(tile: int) -> dict[str, int]:
    return {"num_warps": 8 if tile == 128 else 4, "num_stages": 3}


def cases(target: str) -> list[Case]:
    found = []
    for side, batch, size in (*SHAPES, WIDE):
        launch = plan(batch, side, side, TILE)
        planes = {"H": side, "W": side, "K": size, "BB": launch.images, "UPCAST": False}
        options = {"num_warps": launch.num_warps, "num_stages": 2}
        name = f"evaluation depthwise bf16 {side}x{side} B{batch} k{size}"
        found.append(make_case(name, depthwise_evaluation, batch, {"CHANNELS_OUTER": True} | planes, options))
    for tile in (128, 64):
        blocks = {"CHANNELS_OUTER": True, "HW": 256, "BM": tile, "BN": tile, "BK": 64, "UPCAST": False}
        name = f"evaluation pointwise bf16 16x16 tile {tile}"
        options, halves = _pointwise_options(tile), HALVES | {"weight_ptr"}
        found.append(make_case(name, pointwise_evaluation, 8, blocks, options, halves=halves))
    return found
