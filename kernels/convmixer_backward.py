"""The ConvMixer layer's training backward, all but its matrix products; `convmixer_forward` has the forward.

All but the statistics is computed again, from z or x. Of the convolution's output m and a norm's normal output n:

    g      = BN'(dy, n) GELU'(m)                       dbias, dgamma and dbeta are sums over the channel
    dx     = dy + dtap + g convolved with the mirrored taps
    dw     = the diagonals of g^T shift(x)
    dz     = BN'(dx, n of z) GELU'(z + pre_bias)

with BN'(d, n) = gamma / sigma (d - mean(d) - n mean(d n)), means over all ranks. Forms as in the forward.
"""

# mypy: disallow-untyped-defs=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.case import Case
from mgcc_dist.kernels.convmixer_forward import mix
from mgcc_dist.kernels.convmixer_launch import SHAPES, SIDES, WIDE, average_sums, make_case, plan, shape_of
from mgcc_dist.kernels.convmixer_tile import (
    depthwise,
    depthwise_gradients,
    elements,
    gelu,
    inner_planes,
    load,
    load_biased,
    load_statistics,
    norm_input_gradient,
    outer_planes,
    rows,
    store_dweight,
    store_sums,
    through_norm_and_gelu,
)
from mgcc_dist.kernels.targets import INTERPRETED, target_of

RESIDENT = 2048  # elements of a channel that fit in registers


@triton.jit
def backward_resident(
    z_ptr, pre_bias_ptr, pre_gamma_ptr, pre_beta_ptr, pre_stats_ptr,
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, stats_ptr, dy_ptr, dtap_ptr, g_ptr,
    dz_ptr, dpre_bias_ptr, dpre_gamma_ptr, dpre_beta_ptr, pre_sums_ptr,
    dx_ptr, dweight_ptr, dbias_ptr, dgamma_ptr, dbeta_ptr, sums_ptr, count, pre_eps, eps, B, C,
    NORM: tl.constexpr, TAP: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From dy and, with TAP, from dtap, the gradient of x as an output: dz (NORM) or dx, and every parameter's.

    x is scratch with NORM, and g is: the gradient of the convolution's output.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    image, h, inside = rows(0, B, H, BB)
    x_plane = inner_planes(c, image, C, H, W)
    x_at = elements(x_plane, h, W)
    y_plane = outer_planes(c, image, B, H, W)
    y_at = elements(y_plane, h, W)
    if NORM:
        pre_mean, pre_rstd, pre_scale = load_statistics(pre_stats_ptr, pre_gamma_ptr, c, C, pre_eps, ACC)
        z = load_biased(z_ptr, y_at, inside, pre_bias_ptr, c, ACC)
        x = (gelu(z) - pre_mean) * pre_scale + tl.load(pre_beta_ptr + c).to(ACC)
        tl.store(x_ptr + x_at, x, mask=inside[:, None])
        tl.debug_barrier()
    mixed = depthwise(x_ptr, x_plane, weight_ptr, bias_ptr, c, h, inside, H, W, K, BB, ACC, UPCAST)
    mean, rstd, scale = load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC)
    normal = (gelu(mixed) - mean) * rstd
    dx = load(dy_ptr, y_at, inside, ACC)
    dbeta = tl.sum(dx)
    dgamma = tl.sum(dx * normal)
    store_sums(dbeta_ptr, dgamma_ptr, sums_ptr, c, C, dbeta, dgamma)
    g = through_norm_and_gelu(dx, mixed, normal, dbeta / count, dgamma / count, scale, inside)
    tl.store(dbias_ptr + c, tl.sum(g))
    g = g.to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + y_at, g, mask=inside[:, None])
    tl.debug_barrier()
    if TAP:
        dx += load(dtap_ptr, x_at, inside, ACC)
    dweight = tl.zeros((16, 16), ACC)
    dx, dweight = depthwise_gradients(
        dx, dweight, g, g_ptr, y_plane, x_ptr, x_plane, weight_ptr, c, h, inside, H, W, K, UPCAST
    )  # fmt: skip
    store_dweight(dweight_ptr, c, dweight, K)
    if NORM:
        z = load_biased(z_ptr, y_at, inside, pre_bias_ptr, c, ACC)
        normal = (gelu(z) - pre_mean) * pre_rstd
        dx = tl.where(inside[:, None], dx, 0.0)
        dbeta = tl.sum(dx)
        dgamma = tl.sum(dx * normal)
        store_sums(dpre_beta_ptr, dpre_gamma_ptr, pre_sums_ptr, c, C, dbeta, dgamma)
        dz = through_norm_and_gelu(dx, z, normal, dbeta / count, dgamma / count, pre_scale, inside)
        tl.store(dpre_bias_ptr + c, tl.sum(dz))
        tl.store(dz_ptr + y_at, dz, mask=inside[:, None])
    else:
        tl.store(dx_ptr + x_at, dx, mask=inside[:, None])


@triton.jit
def backward_staged(
    z_ptr, pre_bias_ptr, pre_gamma_ptr, pre_beta_ptr, pre_stats_ptr,
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, stats_ptr, dy_ptr, dtap_ptr, g_ptr,
    dz_ptr, dpre_bias_ptr, dpre_gamma_ptr, dpre_beta_ptr, pre_sums_ptr,
    dx_ptr, dweight_ptr, dbias_ptr, dgamma_ptr, dbeta_ptr, sums_ptr, count, pre_eps, eps, B, C,
    NORM: tl.constexpr, TAP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What `backward_resident` does, in the stages FIRST to LAST of three, each over groups of BB images.

    0: the convolution again, which waits in g, and the sums of its norm; 1: g, dx, dweight, and the sums of the norm of
    z; 2 (NORM): dz, in whose place dx has waited. A norm's sums [2,C] are dbeta and dgamma over all ranks, `count` the
    values of a channel on all ranks.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    mean, rstd, scale = load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC)
    if NORM:
        pre_mean, pre_rstd, pre_scale = load_statistics(pre_stats_ptr, pre_gamma_ptr, c, C, pre_eps, ACC)
    if FIRST == 0:
        dbeta = tl.zeros((), ACC)
        dgamma = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, inside = rows(start, B, H, BB)
            x_plane = inner_planes(c, image, C, H, W)
            x_at = elements(x_plane, h, W)
            y_at = elements(outer_planes(c, image, B, H, W), h, W)
            if NORM:
                z = load_biased(z_ptr, y_at, inside, pre_bias_ptr, c, ACC)
                x = (gelu(z) - pre_mean) * pre_scale + tl.load(pre_beta_ptr + c).to(ACC)
                tl.store(x_ptr + x_at, x, mask=inside[:, None])
                tl.debug_barrier()
            mixed = depthwise(x_ptr, x_plane, weight_ptr, bias_ptr, c, h, inside, H, W, K, BB, ACC, UPCAST)
            tl.store(g_ptr + y_at, mixed, mask=inside[:, None])
            dy = load(dy_ptr, y_at, inside, ACC)
            dbeta += tl.sum(dy)
            dgamma += tl.sum(dy * ((gelu(mixed) - mean) * rstd))
        store_sums(dbeta_ptr, dgamma_ptr, sums_ptr, c, C, dbeta, dgamma)
        tl.debug_barrier()
    if FIRST <= 1 and LAST >= 1:
        mean_dy = tl.load(sums_ptr + c) / count
        mean_dy_normal = tl.load(sums_ptr + C + c) / count
        dbias = tl.zeros((), ACC)
        dweight = tl.zeros((16, 16), ACC)
        dbeta = tl.zeros((), ACC)
        dgamma = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, inside = rows(start, B, H, BB)
            x_plane = inner_planes(c, image, C, H, W)
            x_at = elements(x_plane, h, W)
            y_plane = outer_planes(c, image, B, H, W)
            y_at = elements(y_plane, h, W)
            dx = load(dy_ptr, y_at, inside, ACC)
            mixed = load(g_ptr, y_at, inside, ACC)
            tl.debug_barrier()
            normal = (gelu(mixed) - mean) * rstd
            g = through_norm_and_gelu(dx, mixed, normal, mean_dy, mean_dy_normal, scale, inside)
            dbias += tl.sum(g)
            g = g.to(g_ptr.dtype.element_ty)
            tl.store(g_ptr + y_at, g, mask=inside[:, None])
            tl.debug_barrier()
            if TAP:
                dx += load(dtap_ptr, x_at, inside, ACC)
            dx, dweight = depthwise_gradients(
                dx, dweight, g, g_ptr, y_plane, x_ptr, x_plane, weight_ptr, c, h, inside, H, W, K, UPCAST
            )  # fmt: skip
            if NORM:
                z = load_biased(z_ptr, y_at, inside, pre_bias_ptr, c, ACC)
                dx = tl.where(inside[:, None], dx, 0.0)
                dbeta += tl.sum(dx)
                dgamma += tl.sum(dx * ((gelu(z) - pre_mean) * pre_rstd))
                tl.store(dz_ptr + y_at, dx, mask=inside[:, None])
            else:
                tl.store(dx_ptr + x_at, dx, mask=inside[:, None])
        store_dweight(dweight_ptr, c, dweight, K)
        tl.store(dbias_ptr + c, dbias)
        if NORM:
            store_sums(dpre_beta_ptr, dpre_gamma_ptr, pre_sums_ptr, c, C, dbeta, dgamma)
        tl.debug_barrier()
    if NORM and LAST == 2:
        norm_input_gradient(
            z_ptr, pre_bias_ptr, pre_gamma_ptr, pre_stats_ptr, dz_ptr, dz_ptr, dpre_bias_ptr, pre_sums_ptr,
            count, pre_eps, c, B, C, True, H, W, BB, ACC,
        )  # fmt: skip


class BackwardPlan(NamedTuple):
    images: int
    resident: bool
    options: dict[str, int]
    stages: tuple[tuple[int, int], ...]
    """FIRST and LAST of each launch of the staged form"""


def plan_backward(batch: int, height: int, width: int, resident: int, norm: bool, target: str) -> BackwardPlan:
    """As `plan`, with what keeps the staged form from spilling."""
    images, fits, num_warps = plan(batch, height, width, resident)
    if fits:
        return BackwardPlan(images, True, {"num_warps": num_warps, "num_stages": 2}, ())
    if target == "gfx942":  # masks and pointers fill its scalar registers: no pipeline, fewer rows, a launch a stage
        images = max(images * min(SIDES) // width, 1)
        stages = tuple((stage, stage) for stage in range(3 if norm else 2))
        return BackwardPlan(images, False, {"num_warps": width // 4, "num_stages": 1}, stages)
    # Without a limit of its own ptxas takes 168 registers and spills, to run three programs on a multiprocessor.
    return BackwardPlan(images, False, {"num_warps": num_warps, "num_stages": 2, "maxnreg": 255}, ((0, 2),))


@torch.library.custom_op("mgcc_dist::convmixer_mix_backward", mutates_args=())
def mix_backward(
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
    """(dsource, dweight, [3,C] gradients of bias, gamma, beta, and the same of the norm before) of `mix`.

    `dtap` is the gradient of x as an output. The parameters' gradients are in the type of the statistics.
    """
    norm = pre_bias is not None
    channels, batch, height, width = shape_of(source, norm)
    launch = plan_backward(batch, height, width, 0 if group else RESIDENT, norm, target_of(source.device))
    x = source.new_empty(batch, channels, height, width) if norm else source
    g = torch.empty_like(dy)
    dsource, dweight, dparameters, dpre = _new_gradients(source, weight, stats, norm)
    sums, pre_sums = stats.new_empty(2, channels), stats.new_empty(2, channels)
    values = batch * height * width

    def run(kernel, count: float, **stages: int) -> None:
        kernel[(channels,)](
            source, pre_bias, pre_gamma, pre_beta, pre_stats, x, weight, bias, gamma, stats, dy, dtap, g,
            dsource, *(dpre if norm else (None, None, None)), pre_sums,
            dsource, dweight, *dparameters, sums, count, pre_eps, eps, batch, channels,
            NORM=norm, TAP=dtap is not None,
            H=height, W=width, K=weight.shape[-1], BB=launch.images, UPCAST=INTERPRETED,
            **launch.options, **stages,
        )  # fmt: skip

    if launch.resident:
        run(backward_resident, float(values))
    elif not group:
        for first, last in launch.stages:
            run(backward_staged, float(values), FIRST=first, LAST=last)
    else:  # the sums are divided by the number of values where they are averaged
        run(backward_staged, 1.0, FIRST=0, LAST=0)
        average_sums(sums, values, group)
        run(backward_staged, 1.0, FIRST=1, LAST=1)
        if norm:
            average_sums(pre_sums, values, group)
            run(backward_staged, 1.0, FIRST=2, LAST=2)
    return dsource, dweight, dparameters, dpre


@mix_backward.register_fake
def _(
    dtap, dy, source, pre_bias, pre_gamma, pre_beta, pre_stats, pre_eps, weight, bias, gamma, stats, eps, group
):  # fmt: skip
    return _new_gradients(source, weight, stats, pre_bias is not None)


def _new_gradients(source: Tensor, weight: Tensor, stats: Tensor, norm: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = weight.shape[0]
    dpre = stats.new_empty(3 if norm else 0, channels)
    return torch.empty_like(source), stats.new_empty(weight.shape), stats.new_empty(3, channels), dpre


def _save(ctx, inputs, output):
    source, pre_bias, pre_gamma, pre_beta, ctx.pre_eps, weight, bias, gamma, _, ctx.eps, ctx.group = inputs
    _, _, pre_stats, stats = output
    ctx.save_for_backward(source, pre_bias, pre_gamma, pre_beta, pre_stats, weight, bias, gamma, stats)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dx, dy, _dpre_stats, _dstats):
    source, pre_bias, pre_gamma, pre_beta, pre_stats, weight, bias, gamma, stats = ctx.saved_tensors
    norm = pre_bias is not None
    if dy is None:
        dy = torch.zeros_like(source) if norm else torch.zeros_like(source.transpose(0, 1)).contiguous()
    dsource, dweight, dparameters, dpre = mix_backward(
        dx.contiguous() if norm and dx is not None else None, dy.contiguous(),
        source, pre_bias, pre_gamma, pre_beta, pre_stats, ctx.pre_eps, weight, bias, gamma, stats, ctx.eps, ctx.group,
    )  # fmt: skip
    of_norm = dparameters.to(gamma.dtype).unbind()
    of_pre_norm = dpre.to(gamma.dtype).unbind() if norm else (None, None, None)
    return dsource, *of_pre_norm, None, dweight.to(weight.dtype), *of_norm, None, None


mix.register_autograd(_differentiate, setup_context=_save)


def cases(target: str) -> list[Case]:
    """The backward of `convmixer_forward.cases`."""
    found = []

    def add(name: str, side: int, batch: int, size: int, norm: bool, launch: BackwardPlan, stages: dict) -> None:
        kernel = backward_resident if launch.resident else backward_staged
        constants = {"NORM": norm, "TAP": norm, "H": side, "W": side, "K": size, "BB": launch.images, "UPCAST": False}
        name = f"{name} bf16 {side}x{side} B{batch} k{size}"
        products = stages.get("FIRST") != 2
        found.append(make_case(name, kernel, batch, constants | stages, launch.options, tensor_cores=products))

    for side, batch, size, norm in (*((*shape, norm) for shape in SHAPES for norm in (True, False)), (*WIDE, True)):
        name = "backward" if norm else "backward of a first layer"
        launch = plan_backward(batch, side, side, RESIDENT, norm, target)
        if launch.resident:
            add(name, side, batch, size, norm, launch, {})
        for first, last in launch.stages:
            stage = f" stage {first}" if first == last else ""
            add(f"{name}{stage}", side, batch, size, norm, launch, {"FIRST": first, "LAST": last})
    launch = plan_backward(8, 16, 16, 0, True, target)
    for part in (0, 1, 2):
        add(f"backward stage {part}", 16, 8, 7, True, launch, {"FIRST": part, "LAST": part})
    return found
