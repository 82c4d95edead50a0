"""The multi-scale attention gate by running statistics, in one kernel, two, or the library's convolutions and a tail.

A convolution's bias goes into the centre of its norm; nothing is folded into the weights, so nothing is rounded twice.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from mgcc_dist.kernels.case import Case
from mgcc_dist.kernels.msag_forward import cast_vote, convolve_thrice
from mgcc_dist.kernels.msag_tile import (
    accumulator,
    convolve,
    dot,
    evaluation_tiles,
    gated,
    make_case,
    normalized,
    pixels_of_tile,
    plane_tiles,
    upcast,
)
from mgcc_dist.kernels.targets import target_of

EVALUATION_FORMS = ("one_kernel", "two_kernels", "library_and_tail")


def one_kernel_channels(target: str) -> tuple[int, ...]:
    """What `whole_gate` is compiled for; on gfx942 128 channels spill in any blocks that were tried."""
    return (16, 32, 64) if target == "gfx942" else (16, 32, 64, 128)


@triton.jit
def evaluation_branch(
    votes, x, weight, w_vote, norm, h, w, n, H, W, C: tl.constexpr, BRANCH: tl.constexpr,
    SIZE: tl.constexpr, DILATION: tl.constexpr, PIXELS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """votes [pixels, C] += those of one branch, BN of its channels at a time."""
    for start in tl.static_range(0, C, BN):
        k = start + tl.arange(0, BN)
        acc = tl.zeros((PIXELS, BN), ACC)
        acc = convolve(acc, x, weight, h, w, k, H, W, C, SIZE, DILATION, BK, False, UPCAST)
        u = tl.maximum(normalized(acc, norm, BRANCH * C + k, 3 * C), 0.0).to(x.dtype.element_ty)
        votes = dot(u, tl.load(w_vote + n[None, :] * (3 * C) + BRANCH * C + k[:, None]), votes, UPCAST)
    return votes


@triton.jit
def whole_gate(
    x, w_pointwise, w_ordinary, w_dilated, w_vote, norm, vote_norm, y, H, W,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gate in evaluation, of one tile of pixels and all channels: u stays in registers, branch after branch."""
    image, h, w = pixels_of_tile(tl.program_id(0), H, W, TH, TW)
    plane = image * (H * W * C)
    x += plane
    n = tl.arange(0, C)
    votes = tl.zeros((TH * TW, C), ACC)
    votes = evaluation_branch(
        votes, x, w_pointwise, w_vote, norm, h, w, n, H, W, C, 0, 1, 1, TH * TW, BN, BK, ACC, UPCAST
    )  # fmt: skip
    votes = evaluation_branch(
        votes, x, w_ordinary, w_vote, norm, h, w, n, H, W, C, 1, 3, 1, TH * TW, BN, BK, ACC, UPCAST
    )  # fmt: skip
    votes = evaluation_branch(
        votes, x, w_dilated, w_vote, norm, h, w, n, H, W, C, 2, 3, 2, TH * TW, BN, BK, ACC, UPCAST
    )  # fmt: skip
    place = (h * W + w)[:, None] * C + n[None, :]
    valid = ((h < H) & (w < W))[:, None]
    skip = tl.load(x + place, mask=valid, other=0.0).to(ACC)
    value = gated(skip, votes, vote_norm, n, C)
    tl.store(y + plane + place, value.to(y.dtype.element_ty), mask=valid)


def evaluate(x: Tensor, weights: list[Tensor], w_vote: Tensor, norm: Tensor, vote_norm: Tensor, form: str) -> Tensor:
    """The gate by running statistics: x [B,C,H,W], channels-last; norms [3,3C] and [3,C].

    one_kernel: all of it in one; for the C of `one_kernel_channels`
    two_kernels: the convolutions with norm and ReLU, then the vote with the gate
    library_and_tail: the library's convolutions, then norm, ReLU, vote and gate in one kernel
    """
    _, channels, height, width = x.shape
    if form == "auto":  # what the roofline favours: u out of memory as long as its tile fits
        form = "one_kernel" if channels in one_kernel_channels(target_of(x.device)) else "two_kernels"
    if form == "one_kernel":
        tiles = evaluation_tiles(channels, x.dtype, target_of(x.device))
        y = torch.empty_like(x)
        whole_gate[(plane_tiles(x, tiles),)](
            x, *weights, w_vote, norm, vote_norm, y, height, width,
            C=channels, TH=tiles.rows, TW=tiles.columns, BN=tiles.out, BK=tiles.depth,
            ACC=accumulator(x.dtype), UPCAST=upcast(x.dtype), **tiles.options(),
        )  # fmt: skip
        return y
    if form == "two_kernels":
        u, _, _ = convolve_thrice(x, weights, norm=norm)
        return cast_vote(list(u), w_vote, x, vote_norm=vote_norm)[0]
    if form == "library_and_tail":
        branches = [
            F.conv2d(x, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
            for weight, dilation in zip(weights, (1, 1, 2), strict=True)
        ]
        u = [branch.contiguous(memory_format=torch.channels_last) for branch in branches]
        return cast_vote(u, w_vote, x, norm=norm, vote_norm=vote_norm)[0]
    raise ValueError(f"no form {form!r} of the gate in evaluation; there are {', '.join(EVALUATION_FORMS)}")


def cases(channels: int, target: str) -> list[Case]:
    """The one kernel; the others' are `msag_forward`'s."""
    if channels not in one_kernel_channels(target):
        return []
    tiles = evaluation_tiles(channels, torch.bfloat16, target)
    blocks = {"TH": tiles.rows, "TW": tiles.columns, "BN": tiles.out, "BK": tiles.depth, "UPCAST": False}
    blocks |= {"C": channels, "ACC": tl.float32}
    return [make_case("whole gate", whole_gate, channels, blocks, tiles.options())]
