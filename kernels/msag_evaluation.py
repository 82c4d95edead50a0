"""The multi-scale attention gate with running statistics (evaluation): one kernel, two kernels, or ATen convolutions.

A convolution's bias goes into the center of its norm. Nothing is folded into the weights, so nothing is rounded twice.
Bytes moved, in passes over a [B,C,H,W] tensor: 2 in one kernel (read x, write y), 9 in two (u is written and read).
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from mgcc_dist.kernels.compile_spec import CompileSpec
from mgcc_dist.kernels.msag_forward import launch_branch_convolutions, launch_vote
from mgcc_dist.kernels.msag_tile import (
    accumulator_type,
    apply_gate,
    apply_norm,
    convolve,
    count_tiles,
    dot,
    evaluation_tiles,
    make_compile_spec,
    needs_upcast,
    tile_pixels,
)
from mgcc_dist.kernels.targets import device_target

EVALUATION_IMPLEMENTATIONS = ("single_kernel", "two_kernels", "aten_convolutions")


def single_kernel_channels(target: str) -> tuple[int, ...]:
    """Return the channels `single_kernel_gate` is compiled for; on gfx942 128 spill with every block size tried."""
    return (16, 32, 64) if target == "gfx942" else (16, 32, 64, 128)


@triton.jit
def fused_branch_votes(
    votes, x, weight, w_vote, norm, h, w, n, H, W, C: tl.constexpr, BRANCH: tl.constexpr,
    SIZE: tl.constexpr, DILATION: tl.constexpr, PIXELS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one branch's votes to votes [pixels, C], computing block_n of its channels at a time in registers."""
    for start in tl.static_range(0, C, BN):
        k = start + tl.arange(0, BN)
        acc = tl.zeros((PIXELS, BN), ACC)
        acc = convolve(acc, x, weight, h, w, k, H, W, C, SIZE, DILATION, BK, False, UPCAST)
        u = tl.maximum(apply_norm(acc, norm, BRANCH * C + k, 3 * C), 0.0).to(x.dtype.element_ty)
        votes = dot(u, tl.load(w_vote + n[None, :] * (3 * C) + BRANCH * C + k[:, None]), votes, UPCAST)
    return votes


@triton.jit
def single_kernel_gate(
    x, w_pointwise, w_ordinary, w_dilated, w_vote, norm, vote_norm, y, H, W,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gate in evaluation for one tile of pixels and all channels. u stays in registers, one branch at a time."""
    image, h, w = tile_pixels(tl.program_id(0), H, W, TH, TW)
    plane = image * (H * W * C)
    x += plane
    n = tl.arange(0, C)
    votes = tl.zeros((TH * TW, C), ACC)
    votes = fused_branch_votes(
        votes, x, w_pointwise, w_vote, norm, h, w, n, H, W, C, 0, 1, 1, TH * TW, BN, BK, ACC, UPCAST
    )  # fmt: skip
    votes = fused_branch_votes(
        votes, x, w_ordinary, w_vote, norm, h, w, n, H, W, C, 1, 3, 1, TH * TW, BN, BK, ACC, UPCAST
    )  # fmt: skip
    votes = fused_branch_votes(
        votes, x, w_dilated, w_vote, norm, h, w, n, H, W, C, 2, 3, 2, TH * TW, BN, BK, ACC, UPCAST
    )  # fmt: skip
    offsets = (h * W + w)[:, None] * C + n[None, :]
    valid = ((h < H) & (w < W))[:, None]
    skip = tl.load(x + offsets, mask=valid, other=0.0).to(ACC)
    value = apply_gate(skip, votes, vote_norm, n, C)
    tl.store(y + plane + offsets, value.to(y.dtype.element_ty), mask=valid)


def evaluate(
    x: Tensor, weights: list[Tensor], w_vote: Tensor, norm: Tensor, vote_norm: Tensor, implementation: str
) -> Tensor:
    """Run the gate with running statistics on x [B,C,H,W], channels-last, with norm tables [3,3C] and [3,C].

    single_kernel: everything in one kernel, for the channels in `single_kernel_channels`
    two_kernels: the convolutions with norm and ReLU, then the vote with the gate
    aten_convolutions: ATen's convolutions, then norm, ReLU, vote and gate in one kernel
    auto: single_kernel where supported, else two_kernels
    """
    _, channels, height, width = x.shape
    if implementation == "auto":  # by the roofline: keep u out of memory while its tile fits in registers
        implementation = (
            "single_kernel" if channels in single_kernel_channels(device_target(x.device)) else "two_kernels"
        )
    if implementation == "single_kernel":
        tiles = evaluation_tiles(channels, x.dtype, device_target(x.device))
        y = torch.empty_like(x)
        single_kernel_gate[(count_tiles(x, tiles),)](
            x, *weights, w_vote, norm, vote_norm, y, height, width,
            C=channels, TH=tiles.tile_h, TW=tiles.tile_w, BN=tiles.block_n, BK=tiles.block_k,
            ACC=accumulator_type(x.dtype), UPCAST=needs_upcast(x.dtype), **tiles.options(),
        )  # fmt: skip
        return y
    if implementation == "two_kernels":
        u, _, _ = launch_branch_convolutions(x, weights, norm=norm)
        return launch_vote(list(u), w_vote, x, vote_norm=vote_norm)[0]
    if implementation == "aten_convolutions":
        branches = [
            F.conv2d(x, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
            for weight, dilation in zip(weights, (1, 1, 2), strict=True)
        ]
        u = [branch.contiguous(memory_format=torch.channels_last) for branch in branches]
        return launch_vote(u, w_vote, x, norm=norm, vote_norm=vote_norm)[0]
    raise ValueError(
        f"unknown gate implementation {implementation!r}. Choose from {', '.join(EVALUATION_IMPLEMENTATIONS)}"
    )


def compile_specs(channels: int, target: str) -> list[CompileSpec]:
    """Specs for the single kernel; `msag_forward` has those of the other implementations."""
    if channels not in single_kernel_channels(target):
        return []
    tiles = evaluation_tiles(channels, torch.bfloat16, target)
    blocks = {"TH": tiles.tile_h, "TW": tiles.tile_w, "BN": tiles.block_n, "BK": tiles.block_k, "UPCAST": False}
    blocks |= {"C": channels, "ACC": tl.float32}
    return [make_compile_spec("single kernel", single_kernel_gate, channels, blocks, tiles.options())]
