"""Kernels of the gate's backward with batch statistics; the folder's docstring derives them."""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from .device import apply_norm, convolve, dot, pixel_block, tile_and_channels, tile_pixels


@triton.jit
def standardize(
    value,
    norm_ptr,  # [5,CHANNELS]
    c,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return (value - mean) / sigma of value [pixels, c], with table `norm` [5, CHANNELS]."""
    return (value - tl.load(norm_ptr + c)[None, :]) * tl.load(norm_ptr + 3 * CHANNELS + c)[None, :]


@triton.jit
def norm_backward(
    gradient, x_hat,
    norm_ptr,  # [5,CHANNELS]
    sums_ptr,  # [2,CHANNELS]
    c, pixels,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return the gradient w.r.t. a norm's input. `sums` [2, CHANNELS] are those of the gradient d and of d * x_hat."""
    mean = tl.load(sums_ptr + c) / pixels
    slope = tl.load(sums_ptr + CHANNELS + c) / pixels
    scale = tl.load(norm_ptr + CHANNELS + c)
    return (gradient - mean[None, :] - x_hat * slope[None, :]) * scale[None, :]


@triton.jit
def store_gradient_sums(
    gradient, x_hat,
    partial_ptr,  # [tiles,2,CHANNELS]
    tile, c,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store a tile's sums of the gradient and of gradient * x_hat; invalid pixels must have zero gradient."""
    tl.store(partial_ptr + tile * (2 * CHANNELS) + c, tl.sum(gradient, 0))
    tl.store(partial_ptr + tile * (2 * CHANNELS) + CHANNELS + c, tl.sum(gradient * x_hat, 0))


@triton.jit
def gate_backward(
    x_ptr, v_ptr,  # [BM,C]
    dy_ptr,  # [BM,C], rows dy_stride apart
    norm_ptr,  # [5,C]
    offsets, dy_offsets, valid, c,
    C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return the gradient w.r.t. norm(v), zero where not valid, and the standardized v."""
    v_value = tl.load(v_ptr + offsets, mask=valid, other=0.0).to(ACC)
    grad_y = tl.load(dy_ptr + dy_offsets, mask=valid, other=0.0).to(ACC)
    skip = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(ACC)
    attention = tl.sigmoid(apply_norm(v_value, norm_ptr, c, C))
    return grad_y * skip * attention * (1.0 - attention), standardize(v_value, norm_ptr, c, C)


@triton.jit
def gate_gradient_sums(
    x_ptr, v_ptr,  # [B,H,W,C]
    dy_ptr,  # [B,H,W,C], pixels dy_stride apart
    norm_ptr,  # [5,C]
    partial_ptr,  # [tiles,2,C]
    pixels, dy_stride,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """partial [tiles, 2, C] = each tile's sums of the gradient w.r.t. norm(v), and of that times standardized v."""
    first, row, valid = pixel_block(tl.program_id(0), pixels, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    base = first * C
    offsets = row[:, None] * C + c[None, :]
    dy_offsets = row[:, None] * dy_stride + c[None, :]
    gradient, x_hat = gate_backward(
        x_ptr + base, v_ptr + base, dy_ptr + first * dy_stride, norm_ptr, offsets, dy_offsets, valid[:, None], c, C, ACC
    )  # fmt: skip
    store_gradient_sums(gradient, x_hat, partial_ptr, tl.program_id(0), c, C)


@triton.jit
def gate_gradient(
    x_ptr, v_ptr,  # [B,H,W,C]
    dy_ptr,  # [B,H,W,C], pixels dy_stride apart
    norm_ptr,  # [5,C]
    sums_ptr,  # [2,C]
    dv_ptr,  # [B,H,W,C]
    pixels, dy_stride,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dv [pixels, C] = the gradient w.r.t. v."""
    first, row, valid = pixel_block(tl.program_id(0), pixels, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    base = first * C
    offsets = row[:, None] * C + c[None, :]
    dy_offsets = row[:, None] * dy_stride + c[None, :]
    gradient, x_hat = gate_backward(
        x_ptr + base, v_ptr + base, dy_ptr + first * dy_stride, norm_ptr, offsets, dy_offsets, valid[:, None], c, C, ACC
    )  # fmt: skip
    value = norm_backward(gradient, x_hat, norm_ptr, sums_ptr, c, pixels, C)
    tl.store(dv_ptr + base + offsets, value.to(dv_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit
def vote_gradient(
    dv_ptr,  # [B,H,W,C]
    w_vote_ptr,  # [C,3C]
    u_ptr,  # [3,B,H,W,C]
    norm_ptr,  # [5,3C]
    g_ptr,  # [3,B,H,W,C]
    partial_ptr,  # [tiles,2,3C]
    pixels,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """g [3,pixels,C] = the gradient w.r.t. the branches' norms; partial [tiles, 2, 3C] = its sums per tile."""
    blocks: tl.constexpr = C // BN
    tile = tl.program_id(0) // (3 * blocks)
    block = tl.program_id(0) % (3 * blocks)
    branch = block // blocks
    n = block % blocks * BN + tl.arange(0, BN)
    c = branch * C + n
    first, row, valid = pixel_block(tile, pixels, BM)
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, C, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(dv_ptr + first * C + row[:, None] * C + k[None, :], mask=valid[:, None], other=0.0)
        acc = dot(a, tl.load(w_vote_ptr + k[:, None] * (3 * C) + c[None, :]), acc, UPCAST)
    base = (branch.to(tl.int64) * pixels + first) * C
    offsets = row[:, None] * C + n[None, :]
    branch_value = tl.load(u_ptr + base + offsets, mask=valid[:, None], other=0.0).to(ACC)
    relu_active = valid[:, None] & (apply_norm(branch_value, norm_ptr, c, 3 * C) > 0.0)
    value = tl.where(relu_active, acc, 0.0).to(g_ptr.dtype.element_ty)
    store_gradient_sums(value.to(ACC), standardize(branch_value, norm_ptr, c, 3 * C), partial_ptr, tile, c, 3 * C)
    tl.store(g_ptr + base + offsets, value, mask=valid[:, None])


@triton.jit
def branch_gradient(
    g_ptr, u_ptr,  # [3,B,H,W,C]
    norm_ptr,  # [5,3C]
    sums_ptr,  # [2,3C]
    pixels,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Replace g [3,pixels,C] by du, the gradient w.r.t. the branch convolutions' outputs."""
    blocks: tl.constexpr = C // BC
    branch = tl.program_id(1) // blocks
    n = tl.program_id(1) % blocks * BC + tl.arange(0, BC)
    c = branch * C + n
    first, row, valid = pixel_block(tl.program_id(0), pixels, BM)
    base = (branch.to(tl.int64) * pixels + first) * C
    offsets = row[:, None] * C + n[None, :]
    gradient = tl.load(g_ptr + base + offsets, mask=valid[:, None], other=0.0).to(ACC)
    branch_value = tl.load(u_ptr + base + offsets, mask=valid[:, None], other=0.0).to(ACC)
    value = norm_backward(gradient, standardize(branch_value, norm_ptr, c, 3 * C), norm_ptr, sums_ptr, c, pixels, 3 * C)
    tl.store(g_ptr + base + offsets, value.to(g_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit
def input_gradient(
    du_ptr,  # [3,B,H,W,C]
    w_pointwise_ptr,  # [C,1,C]: out, tap, in
    w_ordinary_ptr, w_dilated_ptr,  # [C,9,C]
    dy_ptr,  # [B,H,W,C], pixels dy_stride apart
    v_ptr,  # [B,H,W,C]
    norm_ptr,  # [5,C]
    dx_ptr,  # [B,H,W,C]
    H, W, pixels, dy_stride,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dx [B,H,W,C] = the three transposed convolutions of du [3,B,H,W,C] + dy (1 + sigmoid(norm(v)))."""
    tile, n = tile_and_channels(C, BN)
    image, h, w = tile_pixels(tile, H, W, TH, TW)
    plane = image * (H * W * C)
    branch = tl.full((), C, tl.int64) * pixels
    du_ptr += plane
    acc = tl.zeros((TH * TW, BN), ACC)
    acc = convolve(acc, du_ptr, w_pointwise_ptr, h, w, n, H, W, C, 1, 1, BK, True, UPCAST)
    acc = convolve(acc, du_ptr + branch, w_ordinary_ptr, h, w, n, H, W, C, 3, 1, BK, True, UPCAST)
    acc = convolve(acc, du_ptr + 2 * branch, w_dilated_ptr, h, w, n, H, W, C, 3, 2, BK, True, UPCAST)
    offsets = (h * W + w)[:, None] * C + n[None, :]
    valid = ((h < H) & (w < W))[:, None]
    v_value = tl.load(v_ptr + plane + offsets, mask=valid, other=0.0).to(ACC)
    dy_offsets = (h * W + w)[:, None] * dy_stride + n[None, :]
    dy_ptr += image * (H * W * dy_stride)
    grad_y = tl.load(dy_ptr + dy_offsets, mask=valid, other=0.0).to(ACC)
    acc += grad_y * (1.0 + tl.sigmoid(apply_norm(v_value, norm_ptr, n, C)))
    tl.store(dx_ptr + plane + offsets, acc.to(dx_ptr.dtype.element_ty), mask=valid)


@triton.jit
def vote_weight_gradient(
    dv_ptr,  # [B,H,W,C]
    u_ptr,  # [3,B,H,W,C]
    norm_ptr,  # [5,3C]
    partial_ptr,  # [splits,C,3C]
    pixels, pixels_per_split,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial [splits, C, 3C] = dv' relu(norm(u)) over each split's `pixels_per_split` pixels, a multiple of BK."""
    split = tl.program_id(1)
    columns: tl.constexpr = C // BN
    m = tl.program_id(0) // (3 * columns) * BM + tl.arange(0, BM)
    block = tl.program_id(0) % (3 * columns)
    branch = block // columns
    n = block % columns * BN + tl.arange(0, BN)
    c = branch * C + n
    first = split.to(tl.int64) * pixels_per_split
    dv_ptr += first * C
    u_ptr += (branch.to(tl.int64) * pixels + first) * C
    remaining = pixels - first
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, pixels_per_split, BK):
        row = start + tl.arange(0, BK)
        valid = (row < remaining)[:, None]
        a = tl.load(dv_ptr + row[:, None] * C + m[None, :], mask=valid, other=0.0)
        b = tl.load(u_ptr + row[:, None] * C + n[None, :], mask=valid, other=0.0)
        b = tl.maximum(apply_norm(b.to(ACC), norm_ptr, c, 3 * C), 0.0).to(b.dtype)
        acc = dot(tl.trans(a), b, acc, UPCAST)
    partial_ptr += split.to(tl.int64) * (3 * C * C)
    tl.store(partial_ptr + m[:, None] * (3 * C) + c[None, :], acc)
