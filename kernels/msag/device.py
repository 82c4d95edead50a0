"""Device functions shared by the kernels of the multi-scale attention gate.

A norm is a table with one row per coefficient and one column per channel: norm(u) = (u - center) * scale + shift. Its
first three rows are center, scale and shift; a table of batch statistics [5,..] also has 1 / sigma and the variance.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def tile_and_channels(C: tl.constexpr, BN: tl.constexpr):
    """Return the program's tile and output channels. Programs that share a tile are adjacent, for L2 reuse."""
    return tl.program_id(0) // (C // BN), tl.program_id(0) % (C // BN) * BN + tl.arange(0, BN)


@triton.jit
def pixel_block(tile, pixels, BM: tl.constexpr):
    """Return the first pixel of a block, the pixel indices relative to it, and their validity mask."""
    first = tile.to(tl.int64) * BM
    row = tl.arange(0, BM)
    return first, row, row < pixels - first


@triton.jit
def tile_pixels(tile, H, W, TH: tl.constexpr, TW: tl.constexpr):
    """Return image, rows and columns of a TH x TW tile. Pixels of the last tiles can be outside the plane."""
    across = tl.cdiv(W, TW)
    down = tl.cdiv(H, TH)
    offsets = tl.arange(0, TH * TW)
    h = (tile // across) % down * TH + offsets // TW
    w = tile % across * TW + offsets % TW
    return (tile // (across * down)).to(tl.int64), h, w


@triton.jit
def convolve(
    acc,
    x_ptr,  # one image [H,W,C]
    weight_ptr,  # [C,SIZE * SIZE,C]: out, tap, in
    h, w, n, H, W,
    C: tl.constexpr, SIZE: tl.constexpr, DILATION: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add to acc [pixels, out] the SIZE x SIZE convolution of image `x` at pixels (h, w), for output channels n.

    `weight` is [C, SIZE * SIZE, C]: out, tap, in. TRANSPOSED computes the input gradient, with mirrored taps.
    """
    blocks: tl.constexpr = C // BK
    for i in range(0, SIZE * SIZE * blocks):
        tap = i // blocks
        k = i % blocks * BK + tl.arange(0, BK)
        down = (tap // SIZE - SIZE // 2) * DILATION
        right = (tap % SIZE - SIZE // 2) * DILATION
        if TRANSPOSED:
            hh = h - down
            ww = w - right
            tap_weight = weight_ptr + (k[:, None] * (SIZE * SIZE) + tap) * C + n[None, :]
        else:
            hh = h + down
            ww = w + right
            tap_weight = weight_ptr + (n[None, :] * (SIZE * SIZE) + tap) * C + k[:, None]
        inside = (hh >= 0) & (hh < H) & (ww >= 0) & (ww < W)
        a = tl.load(x_ptr + (hh * W + ww)[:, None] * C + k[None, :], mask=inside[:, None], other=0.0)
        acc = dot(a, tl.load(tap_weight), acc, UPCAST)
    return acc


@triton.jit
def apply_norm(
    value,
    norm_ptr,  # [3 or 5,CHANNELS]
    c,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Normalize value [pixels, c] with the first three rows of table `norm` [.., CHANNELS]."""
    center = tl.load(norm_ptr + c)
    scale = tl.load(norm_ptr + CHANNELS + c)
    shift = tl.load(norm_ptr + 2 * CHANNELS + c)
    return (value - center[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def apply_gate(
    skip, value,
    norm_ptr,  # [3 or 5,CHANNELS]
    c,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return skip * (1 + sigmoid(norm(value)))."""
    return skip + skip * tl.sigmoid(apply_norm(value, norm_ptr, c, CHANNELS))
