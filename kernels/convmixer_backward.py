"""ConvMixer layer, training backward without the matrix products; `convmixer_forward` has the forward.

Everything except the statistics is recomputed from z or x. With conv = depthwise(x) + bias and x_hat the normalized
value of a norm before gamma and beta:

    g  = BN'(dy, x_hat) GELU'(conv)                    dbias, dgamma and dbeta are sums over the channel
    dx = dy + dtap + g convolved with the mirrored kernel
    dw = the diagonals of g^T shift(x)
    dz = BN'(dx, x_hat of z) GELU'(z + pre_bias)

where BN'(d, x_hat) = gamma / sigma (d - mean(d) - x_hat mean(d x_hat)), with means over all ranks. dtap is the gradient
of x as an output of the stack. There is a resident and a staged kernel, as in the forward.
"""

# mypy: disallow-untyped-defs=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.compile_spec import CompileSpec
from mgcc_dist.kernels.convmixer_forward import spatial_mix
from mgcc_dist.kernels.convmixer_launch import (
    PLANE_SIZES,
    SPEC_LARGE_KERNEL,
    SPEC_SHAPES,
    average_sums,
    cbhw_shape,
    make_compile_spec,
    plan_launch,
)
from mgcc_dist.kernels.convmixer_tile import (
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
from mgcc_dist.kernels.targets import INTERPRETED, device_target

RESIDENT_ELEMENTS = 2048
"""maximum elements per channel that `backward_resident` keeps in registers"""


@triton.jit
def backward_resident(
    z_ptr, pre_bias_ptr, pre_gamma_ptr, pre_beta_ptr, pre_stats_ptr,
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, stats_ptr, dy_ptr, dtap_ptr, g_ptr,
    dz_ptr, dpre_bias_ptr, dpre_gamma_ptr, dpre_beta_ptr, pre_sums_ptr,
    dx_ptr, dweight_ptr, dbias_ptr, dgamma_ptr, dbeta_ptr, sums_ptr, count, pre_eps, eps, B, C,
    PRE_NORM: tl.constexpr, TAP_GRADIENT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, UPCAST: tl.constexpr,
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
    z_ptr, pre_bias_ptr, pre_gamma_ptr, pre_beta_ptr, pre_stats_ptr,
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, stats_ptr, dy_ptr, dtap_ptr, g_ptr,
    dz_ptr, dpre_bias_ptr, dpre_gamma_ptr, dpre_beta_ptr, pre_sums_ptr,
    dx_ptr, dweight_ptr, dbias_ptr, dgamma_ptr, dbeta_ptr, sums_ptr, count, pre_eps, eps, B, C,
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


class BackwardPlan(NamedTuple):
    images_per_tile: int
    resident: bool
    options: dict[str, int]
    stages: tuple[tuple[int, int], ...]
    """FIRST_STAGE and LAST_STAGE of each launch of the staged kernel"""


def plan_backward(batch: int, height: int, width: int, resident: int, pre_norm: bool, target: str) -> BackwardPlan:
    """Return the launch like `plan_launch`, with the compiler options that keep the staged kernel from spilling."""
    images, fits, num_warps = plan_launch(batch, height, width, resident)
    if fits:
        return BackwardPlan(images, True, {"num_warps": num_warps, "num_stages": 2}, ())
    if target == "gfx942":
        # Masks and pointers fill the scalar registers: no pipelining, fewer rows, one launch per stage.
        images = max(images * min(PLANE_SIZES) // width, 1)
        stages = tuple((stage, stage) for stage in range(3 if pre_norm else 2))
        return BackwardPlan(images, False, {"num_warps": width // 4, "num_stages": 1}, stages)
    # Without maxnreg, ptxas limits itself to 168 registers, for three programs per multiprocessor, and spills.
    return BackwardPlan(images, False, {"num_warps": num_warps, "num_stages": 2, "maxnreg": 255}, ((0, 2),))


@torch.library.custom_op("mgcc_dist::convmixer_spatial_mix_backward", mutates_args=())
def spatial_mix_backward(
    dtap: Tensor | None,
    dy: Tensor,
    source: Tensor,
    pre_bias: Tensor | None,
    pre_gamma: Tensor | None,
    pre_beta: Tensor | None,
    pre_stats: Tensor,
    pre_eps: float,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    stats: Tensor,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dsource, dweight, [3,C] gradients of bias, gamma and beta, and the same of the preceding norm).

    `dtap` is the gradient of x as an output. The parameter gradients have the dtype of the statistics.
    """
    pre_norm = pre_bias is not None
    channels, batch, height, width = cbhw_shape(source, pre_norm)
    target = device_target(source.device)
    launch = plan_backward(batch, height, width, 0 if group else RESIDENT_ELEMENTS, pre_norm, target)
    x = source.new_empty(batch, channels, height, width) if pre_norm else source
    g = torch.empty_like(dy)
    dsource, dweight, dparameters, dpre = _new_gradients(source, weight, stats, pre_norm)
    sums, pre_sums = stats.new_empty(2, channels), stats.new_empty(2, channels)
    count = batch * height * width  # values per channel on this rank

    def run(kernel, total_count: float, **stages: int) -> None:
        kernel[(channels,)](
            source, pre_bias, pre_gamma, pre_beta, pre_stats, x, weight, bias, gamma, stats, dy, dtap, g,
            dsource, *(dpre if pre_norm else (None, None, None)), pre_sums,
            dsource, dweight, *dparameters, sums, total_count, pre_eps, eps, batch, channels,
            PRE_NORM=pre_norm, TAP_GRADIENT=dtap is not None,
            H=height, W=width, K=weight.shape[-1], BB=launch.images_per_tile, UPCAST=INTERPRETED,
            **launch.options, **stages,
        )  # fmt: skip

    if launch.resident:
        run(backward_resident, float(count))
    elif not group:
        for first, last in launch.stages:
            run(backward_staged, float(count), FIRST_STAGE=first, LAST_STAGE=last)
    else:  # average_sums divides by the count
        run(backward_staged, 1.0, FIRST_STAGE=0, LAST_STAGE=0)
        average_sums(sums, count, group)
        run(backward_staged, 1.0, FIRST_STAGE=1, LAST_STAGE=1)
        if pre_norm:
            average_sums(pre_sums, count, group)
            run(backward_staged, 1.0, FIRST_STAGE=2, LAST_STAGE=2)
    return dsource, dweight, dparameters, dpre


@spatial_mix_backward.register_fake
def _(
    dtap, dy, source, pre_bias, pre_gamma, pre_beta, pre_stats, pre_eps, weight, bias, gamma, stats, eps, group
):  # fmt: skip
    return _new_gradients(source, weight, stats, pre_bias is not None)


def _new_gradients(
    source: Tensor, weight: Tensor, stats: Tensor, pre_norm: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = weight.shape[0]
    dpre = stats.new_empty(3 if pre_norm else 0, channels)
    return torch.empty_like(source), stats.new_empty(weight.shape), stats.new_empty(3, channels), dpre


def _setup_context(ctx, inputs, output):
    source, pre_bias, pre_gamma, pre_beta, ctx.pre_eps, weight, bias, gamma, _, ctx.eps, ctx.group = inputs
    _, _, pre_stats, stats = output
    ctx.save_for_backward(source, pre_bias, pre_gamma, pre_beta, pre_stats, weight, bias, gamma, stats)
    ctx.set_materialize_grads(False)


def _backward(ctx, dx, dy, _dpre_stats, _dstats):
    source, pre_bias, pre_gamma, pre_beta, pre_stats, weight, bias, gamma, stats = ctx.saved_tensors
    pre_norm = pre_bias is not None
    if dy is None:
        dy = torch.zeros_like(source) if pre_norm else torch.zeros_like(source.transpose(0, 1)).contiguous()
    dsource, dweight, dparameters, dpre = spatial_mix_backward(
        dx.contiguous() if pre_norm and dx is not None else None, dy.contiguous(),
        source, pre_bias, pre_gamma, pre_beta, pre_stats, ctx.pre_eps, weight, bias, gamma, stats, ctx.eps, ctx.group,
    )  # fmt: skip
    norm_gradients = dparameters.to(gamma.dtype).unbind()
    pre_norm_gradients = dpre.to(gamma.dtype).unbind() if pre_norm else (None, None, None)
    return dsource, *pre_norm_gradients, None, dweight.to(weight.dtype), *norm_gradients, None, None


spatial_mix.register_autograd(_backward, setup_context=_setup_context)


def compile_specs(target: str) -> list[CompileSpec]:
    """Specs for the backward of `convmixer_forward.compile_specs`."""
    found = []

    def add(name: str, side: int, batch: int, size: int, pre_norm: bool, launch: BackwardPlan, stages: dict) -> None:
        kernel = backward_resident if launch.resident else backward_staged
        constants = {
            "PRE_NORM": pre_norm,
            "TAP_GRADIENT": pre_norm,
            "H": side,
            "W": side,
            "K": size,
            "BB": launch.images_per_tile,
            "UPCAST": False,
        }
        name = f"{name} bf16 {side}x{side} B{batch} k{size}"
        products = stages.get("FIRST_STAGE") != 2
        found.append(make_compile_spec(name, kernel, batch, constants | stages, launch.options, tensor_cores=products))

    for side, batch, size, pre_norm in (
        *((*shape, pre_norm) for shape in SPEC_SHAPES for pre_norm in (True, False)),
        (*SPEC_LARGE_KERNEL, True),
    ):
        name = "backward" if pre_norm else "backward first layer"
        launch = plan_backward(batch, side, side, RESIDENT_ELEMENTS, pre_norm, target)
        if launch.resident:
            add(name, side, batch, size, pre_norm, launch, {})
        for first, last in launch.stages:
            stage = f" stage {first}" if first == last else ""
            add(f"{name}{stage}", side, batch, size, pre_norm, launch, {"FIRST_STAGE": first, "LAST_STAGE": last})
    launch = plan_backward(8, 16, 16, 0, True, target)
    for part in (0, 1, 2):
        add(f"backward stage {part}", 16, 8, 7, True, launch, {"FIRST_STAGE": part, "LAST_STAGE": part})
    return found
