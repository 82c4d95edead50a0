"""Custom operators of a ConvMixer layer in training, with autograd: spatial mix and final norm.

Saved for backward: the input (z or x) and the statistics [3,C] of the norms; y is saved by the matrix product.
"""

# mypy: disallow-untyped-defs=False

import torch
from torch import Tensor

from ..launch import needs_upcast, statistics_dtype
from ..targets import device_target
from .kernels_backward import backward_resident, backward_staged
from .kernels_forward import forward_resident, forward_staged
from .kernels_norm import final_norm_backward_kernel, final_norm_forward_kernel
from .plan import BACKWARD_RESIDENT, FORWARD_RESIDENT, cbhw_shape, forward_options, plan_backward, plan_launch
from .statistics import average_sums, gather_statistics


@torch.library.custom_op("mgcc_dist::convmixer_spatial_mix", mutates_args=())
def spatial_mix(
    source: Tensor,
    pre_bias: Tensor | None,
    pre_gamma: Tensor | None,
    pre_beta: Tensor | None,
    pre_eps: float,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (x, y, pre_stats, stats), with y [C,B,H,W] = x + BN(GELU(depthwise(x) + bias)).

    With `pre_bias`, source is z [C,B,H,W] and x [B,C,H,W] = BN(GELU(z + pre_bias)). Without it, source is x, and the
    returned x and pre_stats are empty. `group` names the process group that shares statistics ("" for none). Statistics
    are [3,C]: mean, biased variance, unbiased variance.
    """
    pre_norm = pre_bias is not None
    channels, batch, height, width = cbhw_shape(source, pre_norm)
    launch = plan_launch(batch, height, width, 0 if group else FORWARD_RESIDENT)
    x_out, y, pre_stats, stats = _new_mix_outputs(source, pre_norm)

    def run(kernel, **stages: int) -> None:
        kernel[(channels,)](
            source, pre_bias, pre_gamma, pre_beta, pre_stats,
            x_out if pre_norm else source, weight, bias, gamma, beta, stats, y, pre_eps, eps, batch, channels,
            PRE_NORM=pre_norm, H=height, W=width, K=weight.shape[-1], BB=launch.images_per_tile,
            UPCAST=needs_upcast(source.dtype), **forward_options(launch, device_target(source.device)), **stages,
        )  # fmt: skip

    if launch.resident:
        run(forward_resident)
    elif not group:
        run(forward_staged, FIRST_STAGE=0, LAST_STAGE=2)
    else:
        count = batch * height * width
        if pre_norm:
            run(forward_staged, FIRST_STAGE=0, LAST_STAGE=0)
            gather_statistics(pre_stats, count, group)
        run(forward_staged, FIRST_STAGE=1, LAST_STAGE=1)
        gather_statistics(stats, count, group)
        run(forward_staged, FIRST_STAGE=2, LAST_STAGE=2)
    return x_out, y, pre_stats, stats


@spatial_mix.register_fake
def _(source, pre_bias, pre_gamma, pre_beta, pre_eps, weight, bias, gamma, beta, eps, group):
    return _new_mix_outputs(source, pre_bias is not None)


def _new_mix_outputs(source: Tensor, pre_norm: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, batch, height, width = cbhw_shape(source, pre_norm)
    stats = source.new_empty(3, channels, dtype=statistics_dtype(source.dtype))
    pre_stats = torch.empty_like(stats) if pre_norm else stats.new_empty(0)
    x = source.new_empty(batch, channels, height, width) if pre_norm else source.new_empty(0)
    return x, source.new_empty(channels, batch, height, width), pre_stats, stats


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
    launch = plan_backward(batch, height, width, 0 if group else BACKWARD_RESIDENT, pre_norm, target)
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
            H=height, W=width, K=weight.shape[-1], BB=launch.images_per_tile, UPCAST=needs_upcast(source.dtype),
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


def _setup_mix_context(ctx, inputs, output):
    source, pre_bias, pre_gamma, pre_beta, ctx.pre_eps, weight, bias, gamma, _, ctx.eps, ctx.group = inputs
    _, _, pre_stats, stats = output
    ctx.save_for_backward(source, pre_bias, pre_gamma, pre_beta, pre_stats, weight, bias, gamma, stats)
    ctx.set_materialize_grads(False)


def _mix_backward(ctx, dx, dy, _dpre_stats, _dstats):
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


spatial_mix.register_autograd(_mix_backward, setup_context=_setup_mix_context)


@torch.library.custom_op("mgcc_dist::convmixer_final_norm", mutates_args=())
def final_norm(z: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    """Return x [B,C,H,W] and the statistics [3,C] of its norm, from z [C,B,H,W]; `group` as in `spatial_mix`."""
    channels, batch, height, width = z.shape
    launch = plan_launch(batch, height, width, 0)
    x, stats = _new_norm_outputs(z)

    def run(first: int, last: int) -> None:
        final_norm_forward_kernel[(channels,)](
            z, bias, gamma, beta, stats, x, eps, batch, channels,
            FIRST_STAGE=first, LAST_STAGE=last, H=height, W=width, BB=launch.images_per_tile,
            num_warps=launch.num_warps,
        )  # fmt: skip

    if not group:
        run(0, 1)
        return x, stats
    run(0, 0)
    gather_statistics(stats, batch * height * width, group)
    run(1, 1)
    return x, stats


@final_norm.register_fake
def _(z, bias, gamma, beta, eps, group):
    return _new_norm_outputs(z)


def _new_norm_outputs(z: Tensor) -> tuple[Tensor, Tensor]:
    channels, batch, height, width = z.shape
    return z.new_empty(batch, channels, height, width), z.new_empty(3, channels, dtype=statistics_dtype(z.dtype))


@torch.library.custom_op("mgcc_dist::convmixer_final_norm_backward", mutates_args=())
def final_norm_backward(
    dx: Tensor, z: Tensor, bias: Tensor, gamma: Tensor, stats: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    """Return dz and the [3,C] gradients of bias, gamma and beta of `final_norm`."""
    channels, batch, height, width = z.shape
    launch = plan_launch(batch, height, width, 0)
    dz, dparameters = torch.empty_like(z), stats.new_empty(3, channels)
    sums = stats.new_empty(2, channels)
    count = batch * height * width  # values per channel on this rank

    def run(total_count: float, first: int, last: int) -> None:
        final_norm_backward_kernel[(channels,)](
            z, bias, gamma, stats, dx, dz, *dparameters, sums, total_count, eps, batch, channels,
            FIRST_STAGE=first, LAST_STAGE=last, H=height, W=width, BB=launch.images_per_tile,
            num_warps=launch.num_warps,
        )  # fmt: skip

    if not group:
        run(float(count), 0, 1)
        return dz, dparameters
    run(1.0, 0, 0)
    average_sums(sums, count, group)
    run(1.0, 1, 1)
    return dz, dparameters


@final_norm_backward.register_fake
def _(dx, z, bias, gamma, stats, eps, group):
    return torch.empty_like(z), stats.new_empty(3, z.shape[0])


def _setup_norm_context(ctx, inputs, output):
    z, bias, gamma, _, ctx.eps, ctx.group = inputs
    ctx.save_for_backward(z, bias, gamma, output[1])


def _norm_backward(ctx, dx, _dstats):
    z, bias, gamma, stats = ctx.saved_tensors
    dz, dparameters = final_norm_backward(dx.contiguous(), z, bias, gamma, stats, ctx.eps, ctx.group)
    return dz, *dparameters.to(gamma.dtype).unbind(), None, None


final_norm.register_autograd(_norm_backward, setup_context=_setup_norm_context)
