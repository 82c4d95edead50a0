"""ConvMixer layer with running statistics (evaluation), in two kernels. Each norm is a per-channel scale and shift.

y  = x + BN(GELU(depthwise(x) + bias))
x' = BN(GELU(weight y + bias)), one matrix product over all images
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.compile_spec import CompileSpec
from mgcc_dist.kernels.convmixer_launch import (
    BF16_TENSORS,
    SPEC_LARGE_KERNEL,
    SPEC_SHAPES,
    TILE_ELEMENTS,
    cbhw_shape,
    make_compile_spec,
    plan_launch,
)
from mgcc_dist.kernels.convmixer_tile import (
    depthwise_conv,
    gelu,
    load_tile,
    planes_bchw,
    planes_cbhw,
    tile_offsets,
    tile_rows,
)
from mgcc_dist.kernels.targets import INTERPRETED


@triton.jit
def depthwise_kernel(
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, beta_ptr, mean_ptr, variance_ptr, y_ptr, eps, B, C,
    CBHW: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute y [C,B,H,W]; x is [C,B,H,W] if CBHW, else [B,C,H,W]. Grid: (C, groups of images)."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    c = tl.program_id(0)
    image, h, valid = tile_rows(tl.program_id(1) * BB, B, H, BB)
    y_plane = planes_cbhw(c, image, B, H, W)
    y_offsets = tile_offsets(y_plane, h, W)
    if CBHW:
        x_plane, x_offsets = y_plane, y_offsets
    else:
        x_plane = planes_bchw(c, image, C, H, W)
        x_offsets = tile_offsets(x_plane, h, W)
    x = load_tile(x_ptr, x_offsets, valid, ACC)
    activated = gelu(depthwise_conv(x_ptr, x_plane, weight_ptr, bias_ptr, c, h, valid, H, W, K, BB, ACC, UPCAST))
    scale = tl.load(gamma_ptr + c).to(ACC) / tl.sqrt(tl.load(variance_ptr + c).to(ACC) + eps)
    shift = tl.load(beta_ptr + c).to(ACC) - tl.load(mean_ptr + c).to(ACC) * scale
    tl.store(y_ptr + y_offsets, activated * scale + shift + x, mask=valid[:, None])


@triton.jit
def pointwise_kernel(
    y_ptr, weight_ptr, bias_ptr, gamma_ptr, beta_ptr, mean_ptr, variance_ptr, x_ptr, eps, C, N,
    CBHW: tl.constexpr, HW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute x' from weight [C,C] and y [C,N] with N = B H W; x' is [C,B,H,W] if CBHW, else [B,C,H,W].

    Grid: (tiles of rows, tiles of columns). Programs that run at the same time share the columns of y.
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
    columns = n if CBHW else n // HW * C * HW + n % HW
    x_offsets = m[:, None] * (N if CBHW else HW) + columns[None, :]
    tl.store(x_ptr + x_offsets, x, mask=(m < C)[:, None] & (n < N)[None, :])


@torch.library.custom_op("mgcc_dist::convmixer_evaluate", mutates_args=())
def evaluate_layer(
    x: Tensor,
    depthwise: list[Tensor],
    depthwise_eps: float,
    pointwise: list[Tensor],
    pointwise_eps: float,
    input_cbhw: bool,
    output_cbhw: bool,
) -> Tensor:
    """Run one layer with its running statistics. Input and output are [C,B,H,W] where the flags say so, else [B,C,H,W].

    Each list holds weight, bias, gamma, beta, running mean and running variance. The pointwise weight has x's dtype.
    """
    channels, batch, height, width = cbhw_shape(x, input_cbhw)
    launch = plan_launch(batch, height, width, TILE_ELEMENTS)
    y = x.new_empty(channels, batch, height, width)
    depthwise_kernel[(channels, triton.cdiv(batch, launch.images_per_tile))](
        x, *depthwise, y, depthwise_eps, batch, channels, CBHW=input_cbhw,
        H=height, W=width, K=depthwise[0].shape[-1], BB=launch.images_per_tile, UPCAST=INTERPRETED,
        num_warps=launch.num_warps, num_stages=2,
    )  # fmt: skip
    out = _new_output(x, input_cbhw, output_cbhw)
    columns = batch * height * width
    tile = 128 if columns * channels >= 128 * 128 * 100 else 64  # enough tiles to occupy a hundred multiprocessors
    pointwise_kernel[(triton.cdiv(channels, tile), triton.cdiv(columns, tile))](
        y, *pointwise, out, pointwise_eps, channels, columns, CBHW=output_cbhw, HW=height * width,
        BM=tile, BN=tile, BK=64 if x.element_size() == 2 else 32, UPCAST=INTERPRETED,
        **_pointwise_options(tile),
    )  # fmt: skip
    return out


@evaluate_layer.register_fake
def _(x, depthwise, depthwise_eps, pointwise, pointwise_eps, input_cbhw, output_cbhw):
    return _new_output(x, input_cbhw, output_cbhw)


def _new_output(x: Tensor, input_cbhw: bool, output_cbhw: bool) -> Tensor:
    channels, batch, height, width = cbhw_shape(x, input_cbhw)
    return x.new_empty((channels, batch, height, width) if output_cbhw else (batch, channels, height, width))


def _pointwise_options(tile: int) -> dict[str, int]:
    return {"num_warps": 8 if tile == 128 else 4, "num_stages": 3}


def compile_specs(target: str) -> list[CompileSpec]:
    """Specs for both kernels; the pointwise kernel in both of its tile sizes."""
    found = []
    for side, batch, size in (*SPEC_SHAPES, SPEC_LARGE_KERNEL):
        launch = plan_launch(batch, side, side, TILE_ELEMENTS)
        planes = {"H": side, "W": side, "K": size, "BB": launch.images_per_tile, "UPCAST": False}
        options = {"num_warps": launch.num_warps, "num_stages": 2}
        name = f"evaluation depthwise bf16 {side}x{side} B{batch} k{size}"
        found.append(make_compile_spec(name, depthwise_kernel, batch, {"CBHW": True} | planes, options))
    for tile in (128, 64):
        blocks = {"CBHW": True, "HW": 256, "BM": tile, "BN": tile, "BK": 64, "UPCAST": False}
        name = f"evaluation pointwise bf16 16x16 tile {tile}"
        options, bf16_tensors = _pointwise_options(tile), BF16_TENSORS | {"weight_ptr"}
        found.append(make_compile_spec(name, pointwise_kernel, 8, blocks, options, bf16_tensors=bf16_tensors))
    return found
