"""The ConvMixer layer's training forward, all but its matrix product: y from x, or x and y from z, in one kernel.

    x = BN(GELU(z + pre_bias)), or given        y = x + BN(GELU(depthwise(x) + bias))

`forward_resident` keeps all images of a channel in the registers of one program. `forward_staged` goes through any
number in groups, and can stop between its stages for the statistics of other ranks.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.case import Case
from mgcc_dist.kernels.convmixer_launch import (
    SHAPES,
    WIDE,
    Plan,
    accumulator_type,
    gather_statistics,
    make_case,
    plan,
    shape_of,
)
from mgcc_dist.kernels.convmixer_tile import (
    depthwise,
    elements,
    gelu,
    gelu_statistics,
    inner_planes,
    load,
    load_biased,
    load_statistics,
    merge,
    normalised_by_own,
    outer_planes,
    rows,
    store_statistics,
)
from mgcc_dist.kernels.targets import INTERPRETED, target_of

RESIDENT = 8192  # elements of a channel that fit in registers


@triton.jit
def forward_resident(
    z_ptr, pre_bias_ptr, pre_gamma_ptr, pre_beta_ptr, pre_stats_ptr,
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, beta_ptr, stats_ptr, y_ptr, pre_eps, eps, B, C,
    NORM: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Writes y, with NORM (from z) also x, and the statistics of the norms, [3,C] (`store_statistics`)."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    image, h, inside = rows(0, B, H, BB)
    x_plane = inner_planes(c, image, C, H, W)
    x_at = elements(x_plane, h, W)
    y_at = elements(outer_planes(c, image, B, H, W), h, W)
    count = tl.cast(B * H * W, ACC)  # Triton makes B = 1 a constant, which has no .to()
    if NORM:
        activated = gelu(load_biased(z_ptr, y_at, inside, pre_bias_ptr, c, ACC))
        x = normalised_by_own(
            activated, inside, pre_stats_ptr, pre_gamma_ptr, pre_beta_ptr, c, C, count, pre_eps
        )  # fmt: skip
        tl.store(x_ptr + x_at, x, mask=inside[:, None])
        tl.debug_barrier()
    else:
        x = load(x_ptr, x_at, inside, ACC)
    activated = gelu(depthwise(x_ptr, x_plane, weight_ptr, bias_ptr, c, h, inside, H, W, K, BB, ACC, UPCAST))
    mixed = normalised_by_own(activated, inside, stats_ptr, gamma_ptr, beta_ptr, c, C, count, eps)
    tl.store(y_ptr + y_at, mixed + x, mask=inside[:, None])


@triton.jit
def forward_staged(
    z_ptr, pre_bias_ptr, pre_gamma_ptr, pre_beta_ptr, pre_stats_ptr,
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, beta_ptr, stats_ptr, y_ptr, pre_eps, eps, B, C,
    NORM: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What `forward_resident` does, in the stages FIRST to LAST of three, each over groups of BB images.

    0: statistics of GELU(z); 1: x, the convolution, and the statistics of its GELU, which waits in y; 2: y. Statistics
    pass from stage to stage through memory, where ranks merge theirs between two launches.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    if NORM and FIRST == 0:
        gelu_statistics(z_ptr, pre_bias_ptr, pre_stats_ptr, c, B, C, H, W, BB, ACC)
        tl.debug_barrier()
    if FIRST <= 1 and LAST >= 1:
        if NORM:
            pre_mean, _pre_rstd, pre_scale = load_statistics(pre_stats_ptr, pre_gamma_ptr, c, C, pre_eps, ACC)
            pre_beta = tl.load(pre_beta_ptr + c).to(ACC)
        count = tl.zeros((), ACC)
        mean = tl.zeros((), ACC)
        m2 = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, inside = rows(start, B, H, BB)
            x_plane = inner_planes(c, image, C, H, W)
            x_at = elements(x_plane, h, W)
            y_at = elements(outer_planes(c, image, B, H, W), h, W)
            if NORM:
                x = (gelu(load_biased(z_ptr, y_at, inside, pre_bias_ptr, c, ACC)) - pre_mean) * pre_scale + pre_beta
                tl.store(x_ptr + x_at, x, mask=inside[:, None])
                tl.debug_barrier()
            activated = gelu(depthwise(x_ptr, x_plane, weight_ptr, bias_ptr, c, h, inside, H, W, K, BB, ACC, UPCAST))
            tl.store(y_ptr + y_at, activated, mask=inside[:, None])
            count, mean, m2 = merge(count, mean, m2, activated, inside, tl.minimum(B - start, BB), H, W)
        store_statistics(stats_ptr, c, C, count, mean, m2)
        tl.debug_barrier()
    if LAST == 2:
        mean, _rstd, scale = load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC)
        beta = tl.load(beta_ptr + c).to(ACC)
        for start in range(0, B, BB):
            image, h, inside = rows(start, B, H, BB)
            x_at = elements(inner_planes(c, image, C, H, W), h, W)
            y_at = elements(outer_planes(c, image, B, H, W), h, W)
            x = load(x_ptr, x_at, inside, ACC)
            activated = load(y_ptr, y_at, inside, ACC)
            tl.debug_barrier()
            tl.store(y_ptr + y_at, (activated - mean) * scale + beta + x, mask=inside[:, None])


STAGED_REGISTERS = {"sm_86": 128, "sm_89": 128, "sm_120": 168}
"""a thread, of four or three programs on a multiprocessor; by itself ptxas takes 96 there, for five, and spills"""


def compiler_options(launch: Plan, target: str) -> dict[str, int]:
    options = {"num_warps": launch.num_warps, "num_stages": 2}
    if not launch.resident and target in STAGED_REGISTERS:
        options["maxnreg"] = STAGED_REGISTERS[target]
    return options


@torch.library.custom_op("mgcc_dist::convmixer_mix", mutates_args=())
def mix(
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
    """(x, y, pre_stats, stats), with y [C,B,H,W] = x + BN(GELU(depthwise(x) + bias)).

    With `pre_bias`, source is z [C,B,H,W] and x [B,C,H,W] = BN(GELU(z + pre_bias)); without, source is x, and the x and
    pre_stats returned are empty. `group` names the process group that shares statistics, "" for none. Statistics are
    [3,C]: mean, biased and unbiased variance.
    """
    norm = pre_bias is not None
    channels, batch, height, width = shape_of(source, norm)
    launch = plan(batch, height, width, 0 if group else RESIDENT)
    x_out, y, pre_stats, stats = _new_outputs(source, norm)

    def run(kernel, **stages: int) -> None:
        kernel[(channels,)](
            source, pre_bias, pre_gamma, pre_beta, pre_stats,
            x_out if norm else source, weight, bias, gamma, beta, stats, y, pre_eps, eps, batch, channels,
            NORM=norm, H=height, W=width, K=weight.shape[-1], BB=launch.images, UPCAST=INTERPRETED,
            **compiler_options(launch, target_of(source.device)), **stages,
        )  # fmt: skip

    if launch.resident:
        run(forward_resident)
    elif not group:
        run(forward_staged, FIRST=0, LAST=2)
    else:
        count = batch * height * width
        if norm:
            run(forward_staged, FIRST=0, LAST=0)
            gather_statistics(pre_stats, count, group)
        run(forward_staged, FIRST=1, LAST=1)
        gather_statistics(stats, count, group)
        run(forward_staged, FIRST=2, LAST=2)
    return x_out, y, pre_stats, stats


@mix.register_fake
def _(source, pre_bias, pre_gamma, pre_beta, pre_eps, weight, bias, gamma, beta, eps, group):
    return _new_outputs(source, pre_bias is not None)


def _new_outputs(source: Tensor, norm: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, batch, height, width = shape_of(source, norm)
    stats = source.new_empty(3, channels, dtype=accumulator_type(source))
    pre_stats = torch.empty_like(stats) if norm else stats.new_empty(0)
    x = source.new_empty(batch, channels, height, width) if norm else source.new_empty(0)
    return x, source.new_empty(channels, batch, height, width), pre_stats, stats


def cases(target: str) -> list[Case]:
    """A layer within a run, one at its start, and the stages between which ranks share statistics."""
    found = []

    def add(name: str, side: int, batch: int, size: int, norm: bool, stages: dict[str, int]) -> None:
        launch = plan(batch, side, side, 0 if stages else RESIDENT)
        kernel = forward_resident if launch.resident else forward_staged
        constants = {"NORM": norm, "H": side, "W": side, "K": size, "BB": launch.images, "UPCAST": False}
        if not launch.resident:
            constants |= stages or {"FIRST": 0, "LAST": 2}
        options = compiler_options(launch, target)
        name = f"{name} bf16 {side}x{side} B{batch} k{size}"
        found.append(make_case(name, kernel, batch, constants, options, tensor_cores=stages.get("FIRST", 1) == 1))

    for side, batch, size in (*SHAPES, WIDE):
        add("forward", side, batch, size, True, {})
    for side, batch, size in SHAPES:
        add("forward of a first layer", side, batch, size, False, {})
    for stage in (0, 1, 2):
        add(f"forward stage {stage}", 16, 8, 7, True, {"FIRST": stage, "LAST": stage})
    return found
