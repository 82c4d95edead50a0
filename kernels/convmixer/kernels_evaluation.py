"""ConvMixer layer with running statistics, in two kernels. Each norm is a per-channel scale and shift.

y  = x + BN(GELU(depthwise(x) + bias))
x' = BN(GELU(weight y + bias)), one matrix product over all images
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from .device import (
    depthwise_conv,
    gelu,
    load_tile,
    planes_bchw,
    planes_cbhw,
    tile_offsets,
    tile_rows,
)


@triton.jit
def depthwise_kernel(
    x_ptr,  # [C,B,H,W] if CBHW, else [B,C,H,W]
    weight_ptr,  # [C,K,K]
    bias_ptr, gamma_ptr, beta_ptr, mean_ptr, variance_ptr,  # [C]
    y_ptr,  # [C,B,H,W]
    eps, B, C,
    CBHW: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, UPCAST: tl.constexpr,
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
    y_ptr,  # [C,N]
    weight_ptr,  # [C,C]: out, in
    bias_ptr, gamma_ptr, beta_ptr, mean_ptr, variance_ptr,  # [C]
    x_ptr,  # [C,B,H,W] if CBHW, else [B,C,H,W]
    eps, C, N,
    CBHW: tl.constexpr, HW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
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
