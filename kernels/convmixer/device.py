"""Device functions shared by the ConvMixer kernels. Each works on one tile: several images of one channel.

Tile rows are (image, plane row) pairs; tile columns are the W columns of the plane. Arithmetic and statistics use ACC,
the dtype of the statistics (fp32; fp64 in the interpreter's tests). Offsets are 32-bit: tensors have fewer than 2**31
elements (`spec.unsupported_reason` checks this).
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def gelu(x):
    """Exact GELU (erf)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    """Derivative of the exact GELU."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


# Tile addressing and loads.


@triton.jit
def tile_rows(start, B, H: tl.constexpr, BB: tl.constexpr):
    """Return the image index, plane row and validity mask of each tile row, for images start .. start+BB."""
    row = tl.arange(0, BB * H)
    image = start + row // H
    return image, row % H, image < B


@triton.jit
def planes_bchw(c, image, C, H: tl.constexpr, W: tl.constexpr):
    """Return the offsets of the planes of channel c in a [B,C,H,W] tensor."""
    return (image * C + c) * H * W


@triton.jit
def planes_cbhw(c, image, B, H: tl.constexpr, W: tl.constexpr):
    """Return the offsets of the planes of channel c in a [C,B,H,W] tensor."""
    return (c * B + image) * H * W


@triton.jit
def tile_offsets(planes, h, W: tl.constexpr):
    """Return the element offsets [tile rows, W] of plane rows h."""
    return planes[:, None] + (h[:, None] * W + tl.arange(0, W)[None, :])


@triton.jit
def load_tile(
    ptr,  # [B,C,H,W] or [C,B,H,W]
    offsets, valid,
    ACC: tl.constexpr,
):  # fmt: skip
    """Load a tile as ACC; invalid rows read as zero."""
    return tl.load(ptr + offsets, mask=valid[:, None], other=0.0).to(ACC)


@triton.jit
def load_tile_with_bias(
    ptr,  # [C,B,H,W]
    offsets, valid,
    bias_ptr,  # [C]
    c,
    ACC: tl.constexpr,
):  # fmt: skip
    """Load z and add the channel's bias."""
    return load_tile(ptr, offsets, valid, ACC) + tl.load(bias_ptr + c).to(ACC)


# BatchNorm of one channel, forward and backward.


@triton.jit
def tile_statistics(values, valid, count):
    """Return the mean and the sum of squared deviations of the `count` valid values (two passes)."""
    mean = tl.sum(tl.where(valid[:, None], values, 0.0)) / count
    deviation = tl.where(valid[:, None], values - mean, 0.0)
    return mean, tl.sum(deviation * deviation)


@triton.jit
def merge_tile_statistics(count, mean, m2, values, valid, images, H: tl.constexpr, W: tl.constexpr):
    """Merge running statistics (count, mean, m2) with those of a tile of `images` images."""
    count_b = (images * H * W).to(mean.dtype)
    mean_b, m2_b = tile_statistics(values, valid, count_b)
    total = count + count_b
    delta = mean_b - mean
    return total, mean + delta * (count_b / total), m2 + m2_b + delta * delta * (count * count_b / total)


@triton.jit
def store_statistics(
    stats_ptr,  # [3,C]
    c, C, count, mean, m2,
):  # fmt: skip
    """Store mean, biased variance and unbiased variance (for running_var) as the rows of stats [3,C]."""
    tl.store(stats_ptr + c, mean)
    tl.store(stats_ptr + C + c, m2 / count)
    tl.store(stats_ptr + 2 * C + c, m2 / (count - 1))


@triton.jit
def load_statistics(
    stats_ptr,  # [3,C]
    gamma_ptr,  # [C]
    c, C, eps,
    ACC: tl.constexpr,
):  # fmt: skip
    """Return mean, 1 / standard deviation, and gamma / standard deviation."""
    rstd = 1.0 / tl.sqrt(tl.load(stats_ptr + C + c) + eps)
    return tl.load(stats_ptr + c), rstd, rstd * tl.load(gamma_ptr + c).to(ACC)


@triton.jit
def normalize_by_batch(
    values, valid,
    stats_ptr,  # [3,C]
    gamma_ptr, beta_ptr,  # [C]
    c, C, count, eps,
):  # fmt: skip
    """Apply BatchNorm to `values`, which hold the complete channel, and store their statistics."""
    mean, m2 = tile_statistics(values, valid, count)
    store_statistics(stats_ptr, c, C, count, mean, m2)
    scale = tl.load(gamma_ptr + c).to(mean.dtype) / tl.sqrt(m2 / count + eps)
    return (values - mean) * scale + tl.load(beta_ptr + c).to(mean.dtype)


@triton.jit
def gelu_statistics(
    z_ptr,  # [C,B,H,W]
    bias_ptr,  # [C]
    stats_ptr,  # [3,C]
    c, B, C,
    H: tl.constexpr, W: tl.constexpr, BB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute and store the statistics of GELU(z + bias) over channel c."""
    count = tl.zeros((), ACC)
    mean = tl.zeros((), ACC)
    m2 = tl.zeros((), ACC)
    for start in range(0, B, BB):
        image, h, valid = tile_rows(start, B, H, BB)
        offsets = tile_offsets(planes_cbhw(c, image, B, H, W), h, W)
        activated = gelu(load_tile_with_bias(z_ptr, offsets, valid, bias_ptr, c, ACC))
        count, mean, m2 = merge_tile_statistics(count, mean, m2, activated, valid, tl.minimum(B - start, BB), H, W)
    store_statistics(stats_ptr, c, C, count, mean, m2)


@triton.jit
def norm_gelu_backward(gradient, value, x_hat, mean, mean_grad_x_hat, scale, valid):
    """Backward of BN(GELU(value)): gradient w.r.t. value, from the output gradient d, mean(d) and mean(d * x_hat).

    `x_hat` is the normalized value before gamma and beta. `scale` is gamma / standard deviation.
    """
    gradient = (gradient - mean - x_hat * mean_grad_x_hat) * scale * gelu_derivative(value)
    return tl.where(valid[:, None], gradient, 0.0)


@triton.jit
def store_norm_gradients(
    dbeta_ptr, dgamma_ptr,  # [C]
    sums_ptr,  # [2,C]
    c, C, dbeta, dgamma,
):  # fmt: skip
    """Store dbeta and dgamma as parameter gradients and as sums [2,C], which are all-reduced across ranks."""
    tl.store(dbeta_ptr + c, dbeta)
    tl.store(dgamma_ptr + c, dgamma)
    tl.store(sums_ptr + c, dbeta)
    tl.store(sums_ptr + C + c, dgamma)


@triton.jit
def norm_gelu_input_gradient(
    z_ptr,  # [C,B,H,W]
    bias_ptr, gamma_ptr,  # [C]
    stats_ptr,  # [3,C]
    gradient_ptr,  # [C,B,H,W] if GRADIENT_CBHW, else [B,C,H,W]
    dz_ptr,  # [C,B,H,W]
    dbias_ptr,  # [C]
    sums_ptr,  # [2,C]
    count, eps, c, B, C,
    GRADIENT_CBHW: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute dz and dbias of BN(GELU(z + bias)).

    The output gradient is [C,B,H,W] if GRADIENT_CBHW, else [B,C,H,W]. dz may overwrite it.
    """
    mean, rstd, scale = load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC)
    mean_grad = tl.load(sums_ptr + c) / count
    mean_grad_x_hat = tl.load(sums_ptr + C + c) / count
    dbias = tl.zeros((), ACC)
    for start in range(0, B, BB):
        image, h, valid = tile_rows(start, B, H, BB)
        z_offsets = tile_offsets(planes_cbhw(c, image, B, H, W), h, W)
        x_offsets = tile_offsets(planes_bchw(c, image, C, H, W), h, W)
        z = load_tile_with_bias(z_ptr, z_offsets, valid, bias_ptr, c, ACC)
        gradient = load_tile(gradient_ptr, z_offsets if GRADIENT_CBHW else x_offsets, valid, ACC)
        tl.debug_barrier()
        x_hat = (gelu(z) - mean) * rstd
        dz = norm_gelu_backward(gradient, z, x_hat, mean_grad, mean_grad_x_hat, scale, valid)
        dbias += tl.sum(dz)
        tl.store(dz_ptr + z_offsets, dz, mask=valid[:, None])
    tl.store(dbias_ptr + c, dbias)


# Depthwise convolution.


@triton.jit
def load_shifted_rows(
    ptr,  # [B,C,H,W] or [C,B,H,W]
    plane, h, shift, valid,
    H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Load rows h + shift of the planes at offset `plane`; rows outside the plane read as zero."""
    row = h + shift
    mask = valid & (row >= 0) & (row < H)
    return tl.load(ptr + (plane + row * W)[:, None] + tl.arange(0, W)[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def toeplitz_band(
    weight_ptr,  # [K,K], of one channel
    kh,
    W: tl.constexpr, K: tl.constexpr, MIRRORED: tl.constexpr,
):  # fmt: skip
    """Build the banded Toeplitz matrix [column read, column written] of kernel row kh."""
    i = tl.arange(0, W)[:, None]
    j = tl.arange(0, W)[None, :]
    kw = (j - i if MIRRORED else i - j) + K // 2
    return tl.load(weight_ptr + kh * K + kw, mask=(kw >= 0) & (kw < K), other=0.0)


@triton.jit
def depthwise_conv(
    x_ptr,  # [B,C,H,W] or [C,B,H,W]
    plane,
    weight_ptr,  # [C,K,K]
    bias_ptr,  # [C]
    c, h, valid,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution of the tile's planes plus bias; the weight is [C,K,K]."""
    conv = tl.zeros((BB * H, W), ACC)
    for kh in range(K):
        x = load_shifted_rows(x_ptr, plane, h, kh - K // 2, valid, H, W)
        if UPCAST:
            x = x.to(ACC)
        taps = toeplitz_band(weight_ptr + c * K * K, kh, W, K, False).to(x.dtype)
        conv = tl.dot(x, taps, conv, input_precision="ieee", out_dtype=ACC)
    return conv + tl.load(bias_ptr + c).to(ACC)


@triton.jit
def depthwise_conv_backward(
    dx, dweight, g,
    g_ptr,  # [C,B,H,W]
    g_plane,
    x_ptr,  # [B,C,H,W]
    x_plane,
    weight_ptr,  # [C,K,K]
    c, h, valid,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the tile's contribution to dx and to dweight [16,16], of which the first K rows and columns are used.

    The tile's output gradient `g` must also be in memory at `g_ptr`, for the shifted loads.
    """
    if UPCAST:
        g = g.to(dx.dtype)
    g_transposed = tl.trans(g)
    tap = tl.arange(0, 16)
    column = tl.arange(0, W)[:, None] + tap[None, :] - K // 2  # column read by tap kw for output column i
    on_diagonal = (column >= 0) & (column < W) & (tap < K)[None, :]
    column = tl.where(on_diagonal, column, 0)
    for kh in range(K):
        shifted_g = load_shifted_rows(g_ptr, g_plane, h, K // 2 - kh, valid, H, W)
        shifted_x = load_shifted_rows(x_ptr, x_plane, h, kh - K // 2, valid, H, W)
        if UPCAST:
            shifted_g = shifted_g.to(dx.dtype)
            shifted_x = shifted_x.to(dx.dtype)
        taps = toeplitz_band(weight_ptr + c * K * K, kh, W, K, True).to(shifted_g.dtype)
        dx = tl.dot(shifted_g, taps, dx, input_precision="ieee", out_dtype=dx.dtype)
        # [column written, column read]
        products = tl.dot(g_transposed, shifted_x, input_precision="ieee", out_dtype=dx.dtype)
        diagonals = tl.where(on_diagonal, tl.gather(products, column, 1), 0.0)
        dweight += tl.where((tap == kh)[:, None], tl.sum(diagonals, axis=0)[None, :], 0.0)
    return dx, dweight


@triton.jit
def store_weight_gradient(
    dweight_ptr,  # [C,K,K]
    c, dweight,
    K: tl.constexpr,
):  # fmt: skip
    """Store the first K rows and columns of dweight [16,16] as the weight gradient of channel c."""
    kh = tl.arange(0, 16)[:, None]
    kw = tl.arange(0, 16)[None, :]
    tl.store(dweight_ptr + c * K * K + kh * K + kw, dweight, mask=(kh < K) & (kw < K))
