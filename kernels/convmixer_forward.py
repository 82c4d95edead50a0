"""ConvMixer layer, training forward without the matrix product: y from x, or x and y from z, in one kernel.

    x = BN(GELU(z + pre_bias)), or given        y = x + BN(GELU(depthwise(x) + bias))

`forward_resident` keeps all images of a channel in the registers of one program. `forward_staged` processes any batch
in groups of images and can be launched stage by stage, so that ranks can merge statistics in between.

Saved for backward: the input (z or x) and the statistics [3,C] of the norms; y is saved by the matrix product. Bytes
moved, in passes over one activation tensor: 3 (read z, write x and y), or 2 for a first layer (read x, write y).
`convmixer` describes the memory layout and the complete layer.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.compile_spec import CompileSpec
from mgcc_dist.kernels.convmixer_launch import (
    SPEC_LARGE_KERNEL,
    SPEC_SHAPES,
    LaunchPlan,
    accumulator_dtype,
    cbhw_shape,
    gather_statistics,
    make_compile_spec,
    plan_launch,
)
from mgcc_dist.kernels.convmixer_tile import (
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
from mgcc_dist.kernels.targets import INTERPRETED, device_target

RESIDENT_ELEMENTS = 8192
"""maximum elements per channel that `forward_resident` keeps in registers"""


@triton.jit
def forward_resident(
    z_ptr, pre_bias_ptr, pre_gamma_ptr, pre_beta_ptr, pre_stats_ptr,
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, beta_ptr, stats_ptr, y_ptr, pre_eps, eps, B, C,
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
    z_ptr, pre_bias_ptr, pre_gamma_ptr, pre_beta_ptr, pre_stats_ptr,
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, beta_ptr, stats_ptr, y_ptr, pre_eps, eps, B, C,
    PRE_NORM: tl.constexpr, FIRST_STAGE: tl.constexpr, LAST_STAGE: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, UPCAST: tl.constexpr,
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


STAGED_MAX_REGISTERS = {"sm_86": 128, "sm_89": 128, "sm_120": 168}
"""maxnreg, for four or three programs per multiprocessor; by default ptxas uses 96 registers, for five, and spills"""


def compiler_options(launch: LaunchPlan, target: str) -> dict[str, int]:
    """Return num_warps, num_stages and, where ptxas would spill, maxnreg."""
    options = {"num_warps": launch.num_warps, "num_stages": 2}
    if not launch.resident and target in STAGED_MAX_REGISTERS:
        options["maxnreg"] = STAGED_MAX_REGISTERS[target]
    return options


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
    launch = plan_launch(batch, height, width, 0 if group else RESIDENT_ELEMENTS)
    x_out, y, pre_stats, stats = _new_outputs(source, pre_norm)

    def run(kernel, **stages: int) -> None:
        kernel[(channels,)](
            source, pre_bias, pre_gamma, pre_beta, pre_stats,
            x_out if pre_norm else source, weight, bias, gamma, beta, stats, y, pre_eps, eps, batch, channels,
            PRE_NORM=pre_norm, H=height, W=width, K=weight.shape[-1], BB=launch.images_per_tile, UPCAST=INTERPRETED,
            **compiler_options(launch, device_target(source.device)), **stages,
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
    return _new_outputs(source, pre_bias is not None)


def _new_outputs(source: Tensor, pre_norm: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, batch, height, width = cbhw_shape(source, pre_norm)
    stats = source.new_empty(3, channels, dtype=accumulator_dtype(source))
    pre_stats = torch.empty_like(stats) if pre_norm else stats.new_empty(0)
    x = source.new_empty(batch, channels, height, width) if pre_norm else source.new_empty(0)
    return x, source.new_empty(channels, batch, height, width), pre_stats, stats


def compile_specs(target: str) -> list[CompileSpec]:
    """Specs for a layer within a stack, the first layer of a stack, and each stage used with SyncBatchNorm."""
    found = []

    def add(name: str, side: int, batch: int, size: int, pre_norm: bool, stages: dict[str, int]) -> None:
        launch = plan_launch(batch, side, side, 0 if stages else RESIDENT_ELEMENTS)
        kernel = forward_resident if launch.resident else forward_staged
        constants = {
            "PRE_NORM": pre_norm,
            "H": side,
            "W": side,
            "K": size,
            "BB": launch.images_per_tile,
            "UPCAST": False,
        }
        if not launch.resident:
            constants |= stages or {"FIRST_STAGE": 0, "LAST_STAGE": 2}
        options = compiler_options(launch, target)
        name = f"{name} bf16 {side}x{side} B{batch} k{size}"
        found.append(
            make_compile_spec(name, kernel, batch, constants, options, tensor_cores=stages.get("FIRST_STAGE", 1) == 1)
        )

    for side, batch, size in (*SPEC_SHAPES, SPEC_LARGE_KERNEL):
        add("forward", side, batch, size, True, {})
    for side, batch, size in SPEC_SHAPES:
        add("forward first layer", side, batch, size, False, {})
    for stage in (0, 1, 2):
        add(f"forward stage {stage}", 16, 8, 7, True, {"FIRST_STAGE": stage, "LAST_STAGE": stage})
    return found
