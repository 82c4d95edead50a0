"""ConvMixer layer, training forward without the matrix product: y from x, or x and y from z, in one kernel.

`forward_resident` keeps all images of a channel in the registers of one program. `forward_staged` processes any batch
in groups of images and can be launched stage by stage, so that ranks can merge statistics in between.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from .device import (
    depthwise_conv,
    gelu,
    gelu_statistics,
    load_statistics,
    load_tile,
    load_tile_with_bias,
    merge_tile_statistics,
    normalize_by_batch,
    planes_bchw,
    planes_cbhw,
    store_statistics,
    tile_offsets,
    tile_rows,
)


@triton.jit
def forward_resident(
    z_ptr,  # [C,B,H,W]; not read without PRE_NORM
    pre_bias_ptr, pre_gamma_ptr, pre_beta_ptr,  # [C]; None without PRE_NORM
    pre_stats_ptr,  # [3,C]; empty without PRE_NORM
    x_ptr,  # [B,C,H,W]
    weight_ptr,  # [C,K,K]
    bias_ptr, gamma_ptr, beta_ptr,  # [C]
    stats_ptr,  # [3,C]
    y_ptr,  # [C,B,H,W]
    pre_eps, eps, B, C,
    PRE_NORM: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute y, with PRE_NORM (input z) also x, and the statistics [3,C] of the norms (`store_statistics`)."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    image, h, valid = tile_rows(0, B, H, BB)
    x_plane = planes_bchw(c, image, C, H, W)
    x_offsets = tile_offsets(x_plane, h, W)
    y_offsets = tile_offsets(planes_cbhw(c, image, B, H, W), h, W)
    count = tl.cast(B * H * W, ACC)  # B = 1 is a compile-time constant, which has no .to()
    if PRE_NORM:
        activated = gelu(load_tile_with_bias(z_ptr, y_offsets, valid, pre_bias_ptr, c, ACC))
        x = normalize_by_batch(
            activated, valid, pre_stats_ptr, pre_gamma_ptr, pre_beta_ptr, c, C, count, pre_eps
        )  # fmt: skip
        tl.store(x_ptr + x_offsets, x, mask=valid[:, None])
        tl.debug_barrier()
    else:
        x = load_tile(x_ptr, x_offsets, valid, ACC)
    activated = gelu(depthwise_conv(x_ptr, x_plane, weight_ptr, bias_ptr, c, h, valid, H, W, K, BB, ACC, UPCAST))
    normalized = normalize_by_batch(activated, valid, stats_ptr, gamma_ptr, beta_ptr, c, C, count, eps)
    tl.store(y_ptr + y_offsets, normalized + x, mask=valid[:, None])


@triton.jit
def forward_staged(
    z_ptr,  # [C,B,H,W]; not read without PRE_NORM
    pre_bias_ptr, pre_gamma_ptr, pre_beta_ptr,  # [C]; None without PRE_NORM
    pre_stats_ptr,  # [3,C]; empty without PRE_NORM
    x_ptr,  # [B,C,H,W]
    weight_ptr,  # [C,K,K]
    bias_ptr, gamma_ptr, beta_ptr,  # [C]
    stats_ptr,  # [3,C]
    y_ptr,  # [C,B,H,W]
    pre_eps, eps, B, C,
    PRE_NORM: tl.constexpr, FIRST_STAGE: tl.constexpr, LAST_STAGE: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    K: tl.constexpr, BB: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the same as `forward_resident` in stages FIRST_STAGE to LAST_STAGE of three, in groups of BB images.

    Stage 0: statistics of GELU(z + pre_bias). Stage 1: x, and the convolution's GELU, stored in y, with its statistics.
    Stage 2: y. Statistics pass from stage to stage through memory; ranks merge theirs between two launches.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    if PRE_NORM and FIRST_STAGE == 0:
        gelu_statistics(z_ptr, pre_bias_ptr, pre_stats_ptr, c, B, C, H, W, BB, ACC)
        tl.debug_barrier()
    if FIRST_STAGE <= 1 and LAST_STAGE >= 1:
        if PRE_NORM:
            pre_mean, _pre_rstd, pre_scale = load_statistics(pre_stats_ptr, pre_gamma_ptr, c, C, pre_eps, ACC)
            pre_beta = tl.load(pre_beta_ptr + c).to(ACC)
        count = tl.zeros((), ACC)
        mean = tl.zeros((), ACC)
        m2 = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, valid = tile_rows(start, B, H, BB)
            x_plane = planes_bchw(c, image, C, H, W)
            x_offsets = tile_offsets(x_plane, h, W)
            y_offsets = tile_offsets(planes_cbhw(c, image, B, H, W), h, W)
            if PRE_NORM:
                z = load_tile_with_bias(z_ptr, y_offsets, valid, pre_bias_ptr, c, ACC)
                x = (gelu(z) - pre_mean) * pre_scale + pre_beta
                tl.store(x_ptr + x_offsets, x, mask=valid[:, None])
                tl.debug_barrier()
            conv = depthwise_conv(x_ptr, x_plane, weight_ptr, bias_ptr, c, h, valid, H, W, K, BB, ACC, UPCAST)
            activated = gelu(conv)
            tl.store(y_ptr + y_offsets, activated, mask=valid[:, None])
            count, mean, m2 = merge_tile_statistics(count, mean, m2, activated, valid, tl.minimum(B - start, BB), H, W)
        store_statistics(stats_ptr, c, C, count, mean, m2)
        tl.debug_barrier()
    if LAST_STAGE == 2:
        mean, _rstd, scale = load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC)
        beta = tl.load(beta_ptr + c).to(ACC)
        for start in range(0, B, BB):
            image, h, valid = tile_rows(start, B, H, BB)
            x_offsets = tile_offsets(planes_bchw(c, image, C, H, W), h, W)
            y_offsets = tile_offsets(planes_cbhw(c, image, B, H, W), h, W)
            x = load_tile(x_ptr, x_offsets, valid, ACC)
            activated = load_tile(y_ptr, y_offsets, valid, ACC)
            tl.debug_barrier()
            tl.store(y_ptr + y_offsets, (activated - mean) * scale + beta + x, mask=valid[:, None])
