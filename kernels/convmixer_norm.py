"""The norm that ends a run of ConvMixer layers in training: x [B,C,H,W] = BN(GELU(z + bias)) from z [C,B,H,W].

One program a channel, forward and backward, in two stages each: what is summed over the batch, then what needs it.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.case import Case
from mgcc_dist.kernels.convmixer_launch import (
    SHAPES,
    accumulator_type,
    average_sums,
    gather_statistics,
    make_case,
    plan,
)
from mgcc_dist.kernels.convmixer_tile import (
    elements,
    gelu,
    gelu_statistics,
    inner_planes,
    load,
    load_biased,
    load_statistics,
    norm_input_gradient,
    outer_planes,
    rows,
    store_sums,
)


@triton.jit
def norm_forward(
    z_ptr, bias_ptr, gamma_ptr, beta_ptr, stats_ptr, x_ptr, eps, B, C,
    FIRST: tl.constexpr, LAST: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Stage 0 takes the statistics, stage 1 applies them."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    if FIRST == 0:
        gelu_statistics(z_ptr, bias_ptr, stats_ptr, c, B, C, H, W, BB, ACC)
        tl.debug_barrier()
    if LAST == 1:
        mean, _rstd, scale = load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC)
        beta = tl.load(beta_ptr + c).to(ACC)
        for start in range(0, B, BB):
            image, h, inside = rows(start, B, H, BB)
            z_at = elements(outer_planes(c, image, B, H, W), h, W)
            x_at = elements(inner_planes(c, image, C, H, W), h, W)
            x = (gelu(load_biased(z_ptr, z_at, inside, bias_ptr, c, ACC)) - mean) * scale + beta
            tl.store(x_ptr + x_at, x, mask=inside[:, None])


@triton.jit
def norm_backward(
    z_ptr, bias_ptr, gamma_ptr, stats_ptr, dx_ptr, dz_ptr, dbias_ptr, dgamma_ptr, dbeta_ptr, sums_ptr, count, eps, B, C,
    FIRST: tl.constexpr, LAST: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Stage 0 takes the sums, stage 1 (with those of all ranks) writes dz."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    if FIRST == 0:
        mean, rstd, _scale = load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC)
        dbeta = tl.zeros((), ACC)
        dgamma = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, inside = rows(start, B, H, BB)
            z_at = elements(outer_planes(c, image, B, H, W), h, W)
            x_at = elements(inner_planes(c, image, C, H, W), h, W)
            z = load_biased(z_ptr, z_at, inside, bias_ptr, c, ACC)
            dx = load(dx_ptr, x_at, inside, ACC)
            dbeta += tl.sum(dx)
            dgamma += tl.sum(dx * ((gelu(z) - mean) * rstd))
        store_sums(dbeta_ptr, dgamma_ptr, sums_ptr, c, C, dbeta, dgamma)
        tl.debug_barrier()
    if LAST == 1:
        norm_input_gradient(
            z_ptr, bias_ptr, gamma_ptr, stats_ptr, dx_ptr, dz_ptr, dbias_ptr, sums_ptr,
            count, eps, c, B, C, False, H, W, BB, ACC,
        )  # fmt: skip


@torch.library.custom_op("mgcc_dist::convmixer_norm", mutates_args=())
def norm(z: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    """(x [B,C,H,W], its norm's statistics [3,C]) from z [C,B,H,W]; `group` as in `mix`."""
    channels, batch, height, width = z.shape
    launch = plan(batch, height, width, 0)
    x, stats = _new_outputs(z)

    def run(first: int, last: int) -> None:
        norm_forward[(channels,)](
            z, bias, gamma, beta, stats, x, eps, batch, channels,
            FIRST=first, LAST=last, H=height, W=width, BB=launch.images, num_warps=launch.num_warps,
        )  # fmt: skip

    if not group:
        run(0, 1)
        return x, stats
    run(0, 0)
    gather_statistics(stats, batch * height * width, group)
    run(1, 1)
    return x, stats


@norm.register_fake
def _(z, bias, gamma, beta, eps, group):
    return _new_outputs(z)


def _new_outputs(z: Tensor) -> tuple[Tensor, Tensor]:
    channels, batch, height, width = z.shape
    return z.new_empty(batch, channels, height, width), z.new_empty(3, channels, dtype=accumulator_type(z))


@torch.library.custom_op("mgcc_dist::convmixer_norm_backward", mutates_args=())
def norm_gradients(
    dx: Tensor, z: Tensor, bias: Tensor, gamma: Tensor, stats: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    """(dz, [3,C] gradients of bias, gamma, beta) of `norm`."""
    channels, batch, height, width = z.shape
    launch = plan(batch, height, width, 0)
    dz, dparameters = torch.empty_like(z), stats.new_empty(3, channels)
    sums = stats.new_empty(2, channels)
    values = batch * height * width

    def run(count: float, first: int, last: int) -> None:
        norm_backward[(channels,)](
            z, bias, gamma, stats, dx, dz, *dparameters, sums, count, eps, batch, channels,
            FIRST=first, LAST=last, H=height, W=width, BB=launch.images, num_warps=launch.num_warps,
        )  # fmt: skip

    if not group:
        run(float(values), 0, 1)
        return dz, dparameters
    run(1.0, 0, 0)
    average_sums(sums, values, group)
    run(1.0, 1, 1)
    return dz, dparameters


@norm_gradients.register_fake
def _(dx, z, bias, gamma, stats, eps, group):
    return torch.empty_like(z), stats.new_empty(3, z.shape[0])


def _save(ctx, inputs, output):
    z, bias, gamma, _, ctx.eps, ctx.group = inputs
    ctx.save_for_backward(z, bias, gamma, output[1])


def _differentiate(ctx, dx, _dstats):
    z, bias, gamma, stats = ctx.saved_tensors
    dz, dparameters = norm_gradients(dx.contiguous(), z, bias, gamma, stats, ctx.eps, ctx.group)
    return dz, *dparameters.to(gamma.dtype).unbind(), None, None


norm.register_autograd(_differentiate, setup_context=_save)


def cases(target: str) -> list[Case]:
    found = []
    for side, batch, _ in SHAPES:
        launch = plan(batch, side, side, 0)
        constants = {"FIRST": 0, "LAST": 1, "H": side, "W": side, "BB": launch.images}
        for name, kernel in (("norm forward", norm_forward), ("norm backward", norm_backward)):
            name = f"{name} bf16 {side}x{side} B{batch}"
            options = {"num_warps": launch.num_warps}
            found.append(make_case(name, kernel, batch, constants, options, tensor_cores=False))
    return found
