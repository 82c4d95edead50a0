"""ConvMixer layer, training backward without the matrix products; a resident and a staged kernel, as in the forward.

g and, with PRE_NORM, x are scratch memory: g for the gradient of the convolution's output.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from .device import (
    depthwise_conv,
    depthwise_conv_backward,
    gelu,
    load_statistics,
    load_tile,
    load_tile_with_bias,
    norm_gelu_backward,
    norm_gelu_input_gradient,
    planes_bchw,
    planes_cbhw,
    store_norm_gradients,
    store_weight_gradient,
    tile_offsets,
    tile_rows,
)


@triton.jit
def backward_resident(
    z_ptr,  # [C,B,H,W]; not read without PRE_NORM
    pre_bias_ptr, pre_gamma_ptr, pre_beta_ptr,  # [C]; None without PRE_NORM
    pre_stats_ptr,  # [3,C]; empty without PRE_NORM
    x_ptr,  # [B,C,H,W]
    weight_ptr,  # [C,K,K]
    bias_ptr, gamma_ptr,  # [C]
    stats_ptr,  # [3,C]
    dy_ptr,  # [C,B,H,W]
    dtap_ptr,  # [B,C,H,W]; None without TAP_GRADIENT
    g_ptr,  # [C,B,H,W]
    dz_ptr,  # [C,B,H,W]; not written without PRE_NORM
    dpre_bias_ptr, dpre_gamma_ptr, dpre_beta_ptr,  # [C]; None without PRE_NORM
    pre_sums_ptr,  # [2,C]
    dx_ptr,  # [B,C,H,W]; not written with PRE_NORM
    dweight_ptr,  # [C,K,K]
    dbias_ptr, dgamma_ptr, dbeta_ptr,  # [C]
    sums_ptr,  # [2,C]
    count, pre_eps, eps, B, C,
    PRE_NORM: tl.constexpr, TAP_GRADIENT: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    BB: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From dy, and with TAP_GRADIENT from dtap, compute dz (PRE_NORM) or dx, and the gradients of all parameters.

    g is scratch memory for the gradient of the convolution's output. With PRE_NORM, x is scratch memory too.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    image, h, valid = tile_rows(0, B, H, BB)
    x_plane = planes_bchw(c, image, C, H, W)
    x_offsets = tile_offsets(x_plane, h, W)
    y_plane = planes_cbhw(c, image, B, H, W)
    y_offsets = tile_offsets(y_plane, h, W)
    if PRE_NORM:
        pre_mean, pre_rstd, pre_scale = load_statistics(pre_stats_ptr, pre_gamma_ptr, c, C, pre_eps, ACC)
        z = load_tile_with_bias(z_ptr, y_offsets, valid, pre_bias_ptr, c, ACC)
        x = (gelu(z) - pre_mean) * pre_scale + tl.load(pre_beta_ptr + c).to(ACC)
        tl.store(x_ptr + x_offsets, x, mask=valid[:, None])
        tl.debug_barrier()
    conv = depthwise_conv(x_ptr, x_plane, weight_ptr, bias_ptr, c, h, valid, H, W, K, BB, ACC, UPCAST)
    mean, rstd, scale = load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC)
    x_hat = (gelu(conv) - mean) * rstd
    dx = load_tile(dy_ptr, y_offsets, valid, ACC)
    dbeta = tl.sum(dx)
    dgamma = tl.sum(dx * x_hat)
    store_norm_gradients(dbeta_ptr, dgamma_ptr, sums_ptr, c, C, dbeta, dgamma)
    g = norm_gelu_backward(dx, conv, x_hat, dbeta / count, dgamma / count, scale, valid)
    tl.store(dbias_ptr + c, tl.sum(g))
    g = g.to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + y_offsets, g, mask=valid[:, None])
    tl.debug_barrier()
    if TAP_GRADIENT:
        dx += load_tile(dtap_ptr, x_offsets, valid, ACC)
    dweight = tl.zeros((16, 16), ACC)
    dx, dweight = depthwise_conv_backward(
        dx, dweight, g, g_ptr, y_plane, x_ptr, x_plane, weight_ptr, c, h, valid, H, W, K, UPCAST
    )  # fmt: skip
    store_weight_gradient(dweight_ptr, c, dweight, K)
    if PRE_NORM:
        z = load_tile_with_bias(z_ptr, y_offsets, valid, pre_bias_ptr, c, ACC)
        x_hat = (gelu(z) - pre_mean) * pre_rstd
        dx = tl.where(valid[:, None], dx, 0.0)
        dbeta = tl.sum(dx)
        dgamma = tl.sum(dx * x_hat)
        store_norm_gradients(dpre_beta_ptr, dpre_gamma_ptr, pre_sums_ptr, c, C, dbeta, dgamma)
        dz = norm_gelu_backward(dx, z, x_hat, dbeta / count, dgamma / count, pre_scale, valid)
        tl.store(dpre_bias_ptr + c, tl.sum(dz))
        tl.store(dz_ptr + y_offsets, dz, mask=valid[:, None])
    else:
        tl.store(dx_ptr + x_offsets, dx, mask=valid[:, None])


@triton.jit
def backward_staged(
    z_ptr,  # [C,B,H,W]; not read without PRE_NORM
    pre_bias_ptr, pre_gamma_ptr, pre_beta_ptr,  # [C]; None without PRE_NORM
    pre_stats_ptr,  # [3,C]; empty without PRE_NORM
    x_ptr,  # [B,C,H,W]
    weight_ptr,  # [C,K,K]
    bias_ptr, gamma_ptr,  # [C]
    stats_ptr,  # [3,C]
    dy_ptr,  # [C,B,H,W]
    dtap_ptr,  # [B,C,H,W]; None without TAP_GRADIENT
    g_ptr,  # [C,B,H,W]
    dz_ptr,  # [C,B,H,W]; not written without PRE_NORM
    dpre_bias_ptr, dpre_gamma_ptr, dpre_beta_ptr,  # [C]; None without PRE_NORM
    pre_sums_ptr,  # [2,C]
    dx_ptr,  # [B,C,H,W]; not written with PRE_NORM
    dweight_ptr,  # [C,K,K]
    dbias_ptr, dgamma_ptr, dbeta_ptr,  # [C]
    sums_ptr,  # [2,C]
    count, pre_eps, eps, B, C,
    PRE_NORM: tl.constexpr, TAP_GRADIENT: tl.constexpr, FIRST_STAGE: tl.constexpr, LAST_STAGE: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the same as `backward_resident` in stages FIRST_STAGE to LAST_STAGE of three, in groups of BB images.

    Stage 0: the recomputed convolution, stored in g, and the sums of its norm. Stage 1: g, dx, dweight, and the sums of
    the norm of z. Stage 2 (PRE_NORM): dz, in place of dx. The sums [2,C] of a norm are dbeta and dgamma over all ranks,
    and `count` is the number of values per channel over all ranks.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    mean, rstd, scale = load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC)
    if PRE_NORM:
        pre_mean, pre_rstd, pre_scale = load_statistics(pre_stats_ptr, pre_gamma_ptr, c, C, pre_eps, ACC)
    if FIRST_STAGE == 0:
        dbeta = tl.zeros((), ACC)
        dgamma = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, valid = tile_rows(start, B, H, BB)
            x_plane = planes_bchw(c, image, C, H, W)
            x_offsets = tile_offsets(x_plane, h, W)
            y_offsets = tile_offsets(planes_cbhw(c, image, B, H, W), h, W)
            if PRE_NORM:
                z = load_tile_with_bias(z_ptr, y_offsets, valid, pre_bias_ptr, c, ACC)
                x = (gelu(z) - pre_mean) * pre_scale + tl.load(pre_beta_ptr + c).to(ACC)
                tl.store(x_ptr + x_offsets, x, mask=valid[:, None])
                tl.debug_barrier()
            conv = depthwise_conv(x_ptr, x_plane, weight_ptr, bias_ptr, c, h, valid, H, W, K, BB, ACC, UPCAST)
            tl.store(g_ptr + y_offsets, conv, mask=valid[:, None])
            dy = load_tile(dy_ptr, y_offsets, valid, ACC)
            dbeta += tl.sum(dy)
            dgamma += tl.sum(dy * ((gelu(conv) - mean) * rstd))
        store_norm_gradients(dbeta_ptr, dgamma_ptr, sums_ptr, c, C, dbeta, dgamma)
        tl.debug_barrier()
    if FIRST_STAGE <= 1 and LAST_STAGE >= 1:
        mean_dy = tl.load(sums_ptr + c) / count
        mean_dy_x_hat = tl.load(sums_ptr + C + c) / count
        dbias = tl.zeros((), ACC)
        dweight = tl.zeros((16, 16), ACC)
        dbeta = tl.zeros((), ACC)
        dgamma = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, valid = tile_rows(start, B, H, BB)
            x_plane = planes_bchw(c, image, C, H, W)
            x_offsets = tile_offsets(x_plane, h, W)
            y_plane = planes_cbhw(c, image, B, H, W)
            y_offsets = tile_offsets(y_plane, h, W)
            dx = load_tile(dy_ptr, y_offsets, valid, ACC)
            conv = load_tile(g_ptr, y_offsets, valid, ACC)
            tl.debug_barrier()
            x_hat = (gelu(conv) - mean) * rstd
            g = norm_gelu_backward(dx, conv, x_hat, mean_dy, mean_dy_x_hat, scale, valid)
            dbias += tl.sum(g)
            g = g.to(g_ptr.dtype.element_ty)
            tl.store(g_ptr + y_offsets, g, mask=valid[:, None])
            tl.debug_barrier()
            if TAP_GRADIENT:
                dx += load_tile(dtap_ptr, x_offsets, valid, ACC)
            dx, dweight = depthwise_conv_backward(
                dx, dweight, g, g_ptr, y_plane, x_ptr, x_plane, weight_ptr, c, h, valid, H, W, K, UPCAST
            )  # fmt: skip
            if PRE_NORM:
                z = load_tile_with_bias(z_ptr, y_offsets, valid, pre_bias_ptr, c, ACC)
                dx = tl.where(valid[:, None], dx, 0.0)
                dbeta += tl.sum(dx)
                dgamma += tl.sum(dx * ((gelu(z) - pre_mean) * pre_rstd))
                tl.store(dz_ptr + y_offsets, dx, mask=valid[:, None])
            else:
                tl.store(dx_ptr + x_offsets, dx, mask=valid[:, None])
        store_weight_gradient(dweight_ptr, c, dweight, K)
        tl.store(dbias_ptr + c, dbias)
        if PRE_NORM:
            store_norm_gradients(dpre_beta_ptr, dpre_gamma_ptr, pre_sums_ptr, c, C, dbeta, dgamma)
        tl.debug_barrier()
    if PRE_NORM and LAST_STAGE == 2:
        norm_gelu_input_gradient(
            z_ptr, pre_bias_ptr, pre_gamma_ptr, pre_stats_ptr, dz_ptr, dz_ptr, dpre_bias_ptr, pre_sums_ptr,
            count, pre_eps, c, B, C, True, H, W, BB, ACC,
        )  # fmt: skip
