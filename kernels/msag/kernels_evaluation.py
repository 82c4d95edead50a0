"""The gate with running statistics in one kernel."""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from .device import apply_gate, apply_norm, convolve, dot, tile_pixels


@triton.jit
def fused_branch_votes(
    votes,
    x_ptr,  # one image [H,W,C]
    weight_ptr,  # [C,SIZE * SIZE,C]: out, tap, in
    w_vote_ptr,  # [C,3C]
    norm_ptr,  # [3,3C]
    h, w, n, H, W,
    C: tl.constexpr, BRANCH: tl.constexpr, SIZE: tl.constexpr, DILATION: tl.constexpr, PIXELS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one branch's votes to votes [pixels, C], computing block_n of its channels at a time in registers."""
    for start in tl.static_range(0, C, BN):
        k = start + tl.arange(0, BN)
        acc = tl.zeros((PIXELS, BN), ACC)
        acc = convolve(acc, x_ptr, weight_ptr, h, w, k, H, W, C, SIZE, DILATION, BK, False, UPCAST)
        u = tl.maximum(apply_norm(acc, norm_ptr, BRANCH * C + k, 3 * C), 0.0).to(x_ptr.dtype.element_ty)
        votes = dot(u, tl.load(w_vote_ptr + n[None, :] * (3 * C) + BRANCH * C + k[:, None]), votes, UPCAST)
    return votes


@triton.jit
def single_kernel_gate(
    x_ptr,  # [B,H,W,C]
    w_pointwise_ptr,  # [C,1,C]: out, tap, in
    w_ordinary_ptr, w_dilated_ptr,  # [C,9,C]
    w_vote_ptr,  # [C,3C]
    norm_ptr,  # [3,3C]
    vote_norm_ptr,  # [3,C]
    y_ptr,  # [B,H,W,C]
    H, W,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The gate in evaluation for one tile of pixels and all channels. u stays in registers, one branch at a time."""
    image, h, w = tile_pixels(tl.program_id(0), H, W, TH, TW)
    plane = image * (H * W * C)
    x_ptr += plane
    n = tl.arange(0, C)
    votes = tl.zeros((TH * TW, C), ACC)
    votes = fused_branch_votes(
        votes, x_ptr, w_pointwise_ptr, w_vote_ptr, norm_ptr, h, w, n, H, W, C, 0, 1, 1, TH * TW, BN, BK, ACC, UPCAST
    )  # fmt: skip
    votes = fused_branch_votes(
        votes, x_ptr, w_ordinary_ptr, w_vote_ptr, norm_ptr, h, w, n, H, W, C, 1, 3, 1, TH * TW, BN, BK, ACC, UPCAST
    )  # fmt: skip
    votes = fused_branch_votes(
        votes, x_ptr, w_dilated_ptr, w_vote_ptr, norm_ptr, h, w, n, H, W, C, 2, 3, 2, TH * TW, BN, BK, ACC, UPCAST
    )  # fmt: skip
    offsets = (h * W + w)[:, None] * C + n[None, :]
    valid = ((h < H) & (w < W))[:, None]
    skip = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(ACC)
    value = apply_gate(skip, votes, vote_norm_ptr, n, C)
    tl.store(y_ptr + plane + offsets, value.to(y_ptr.dtype.element_ty), mask=valid)
