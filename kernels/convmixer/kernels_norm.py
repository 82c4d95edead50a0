"""The BatchNorm that ends a stack of ConvMixer layers in training: x [B,C,H,W] = BN(GELU(z + bias)) from z [C,B,H,W].

Forward and backward use one program per channel and two stages: the reductions over the batch, then their use.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from .device import (
    gelu,
    gelu_statistics,
    load_statistics,
    load_tile,
    load_tile_with_bias,
    norm_gelu_input_gradient,
    planes_bchw,
    planes_cbhw,
    store_norm_gradients,
    tile_offsets,
    tile_rows,
)


@triton.jit
def final_norm_forward_kernel(
    z_ptr,  # [C,B,H,W]
    bias_ptr, gamma_ptr, beta_ptr,  # [C]
    stats_ptr,  # [3,C]
    x_ptr,  # [B,C,H,W]
    eps, B, C,
    FIRST_STAGE: tl.constexpr, LAST_STAGE: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Stage 0 computes the statistics, stage 1 applies them."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    if FIRST_STAGE == 0:
        gelu_statistics(z_ptr, bias_ptr, stats_ptr, c, B, C, H, W, BB, ACC)
        tl.debug_barrier()
    if LAST_STAGE == 1:
        mean, _rstd, scale = load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC)
        beta = tl.load(beta_ptr + c).to(ACC)
        for start in range(0, B, BB):
            image, h, valid = tile_rows(start, B, H, BB)
            z_offsets = tile_offsets(planes_cbhw(c, image, B, H, W), h, W)
            x_offsets = tile_offsets(planes_bchw(c, image, C, H, W), h, W)
            x = (gelu(load_tile_with_bias(z_ptr, z_offsets, valid, bias_ptr, c, ACC)) - mean) * scale + beta
            tl.store(x_ptr + x_offsets, x, mask=valid[:, None])


@triton.jit
def final_norm_backward_kernel(
    z_ptr,  # [C,B,H,W]
    bias_ptr, gamma_ptr,  # [C]
    stats_ptr,  # [3,C]
    dx_ptr,  # [B,C,H,W]
    dz_ptr,  # [C,B,H,W]
    dbias_ptr, dgamma_ptr, dbeta_ptr,  # [C]
    sums_ptr,  # [2,C]
    count, eps, B, C,
    FIRST_STAGE: tl.constexpr, LAST_STAGE: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Stage 0 computes the sums, stage 1 uses them (after SyncBatchNorm: those of all ranks) to compute dz."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    if FIRST_STAGE == 0:
        mean, rstd, _scale = load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC)
        dbeta = tl.zeros((), ACC)
        dgamma = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, valid = tile_rows(start, B, H, BB)
            z_offsets = tile_offsets(planes_cbhw(c, image, B, H, W), h, W)
            x_offsets = tile_offsets(planes_bchw(c, image, C, H, W), h, W)
            z = load_tile_with_bias(z_ptr, z_offsets, valid, bias_ptr, c, ACC)
            dx = load_tile(dx_ptr, x_offsets, valid, ACC)
            dbeta += tl.sum(dx)
            dgamma += tl.sum(dx * ((gelu(z) - mean) * rstd))
        store_norm_gradients(dbeta_ptr, dgamma_ptr, sums_ptr, c, C, dbeta, dgamma)
        tl.debug_barrier()
    if LAST_STAGE == 1:
        norm_gelu_input_gradient(
            z_ptr, bias_ptr, gamma_ptr, stats_ptr, dx_ptr, dz_ptr, dbias_ptr, sums_ptr,
            count, eps, c, B, C, False, H, W, BB, ACC,
        )  # fmt: skip
