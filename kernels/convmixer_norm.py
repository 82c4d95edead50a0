"""The BatchNorm that ends a stack of ConvMixer layers in training: x [B,C,H,W] = BN(GELU(z + bias)) from z [C,B,H,W].

Forward and backward use one program per channel and two stages: the reductions over the batch, then their use. Saved
for backward are z and the statistics [3,C].
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.compile_spec import CompileSpec
from mgcc_dist.kernels.convmixer_launch import (
    SPEC_SHAPES,
    accumulator_dtype,
    average_sums,
    gather_statistics,
    make_compile_spec,
    plan_launch,
)
from mgcc_dist.kernels.convmixer_tile import (
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
    z_ptr, bias_ptr, gamma_ptr, beta_ptr, stats_ptr, x_ptr, eps, B, C,
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
    z_ptr, bias_ptr, gamma_ptr, stats_ptr, dx_ptr, dz_ptr, dbias_ptr, dgamma_ptr, dbeta_ptr, sums_ptr, count, eps, B, C,
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


@torch.library.custom_op("mgcc_dist::convmixer_final_norm", mutates_args=())
def final_norm(z: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    """Return x [B,C,H,W] and the statistics [3,C] of its norm, from z [C,B,H,W]; `group` as in `spatial_mix`."""
    channels, batch, height, width = z.shape
    launch = plan_launch(batch, height, width, 0)
    x, stats = _new_outputs(z)

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
    return _new_outputs(z)


def _new_outputs(z: Tensor) -> tuple[Tensor, Tensor]:
    channels, batch, height, width = z.shape
    return z.new_empty(batch, channels, height, width), z.new_empty(3, channels, dtype=accumulator_dtype(z))


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


def _setup_context(ctx, inputs, output):
    z, bias, gamma, _, ctx.eps, ctx.group = inputs
    ctx.save_for_backward(z, bias, gamma, output[1])


def _backward(ctx, dx, _dstats):
    z, bias, gamma, stats = ctx.saved_tensors
    dz, dparameters = final_norm_backward(dx.contiguous(), z, bias, gamma, stats, ctx.eps, ctx.group)
    return dz, *dparameters.to(gamma.dtype).unbind(), None, None


final_norm.register_autograd(_backward, setup_context=_setup_context)


def compile_specs(target: str) -> list[CompileSpec]:
    """Specs for the forward and backward, with both stages in one launch."""
    found = []
    for side, batch, _ in SPEC_SHAPES:
        launch = plan_launch(batch, side, side, 0)
        constants = {"FIRST_STAGE": 0, "LAST_STAGE": 1, "H": side, "W": side, "BB": launch.images_per_tile}
        for name, kernel in (
            ("norm forward", final_norm_forward_kernel),
            ("norm backward", final_norm_backward_kernel),
        ):
            name = f"{name} bf16 {side}x{side} B{batch}"
            options = {"num_warps": launch.num_warps}
            found.append(make_compile_spec(name, kernel, batch, constants, options, tensor_cores=False))
    return found
