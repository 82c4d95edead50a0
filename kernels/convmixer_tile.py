"""What the Triton kernels of a ConvMixer layer do with one tile: images of one channel. `convmixer` says what for.

Rows of a tile are (image, row of the plane), its columns the W columns of the plane.

**Depthwise convolution on tensor cores.** For each of the K rows of taps the plane, shifted by that row, is multiplied
by the banded Toeplitz matrix T[i,j] = w[kh, i-j+P], P = K // 2, which is built in registers; zero padding is the mask
of the shifted load and the band's end. The gradient of the input is the same with shifts and band mirrored. The
gradient of w[kh,:] lies on the diagonals of g^T shift(x), also a matrix product.

**Shifted loads** read what the program itself has stored in device memory, after a barrier (L1 and L2 serve them). What
is overwritten in place is read before a barrier. Statistics are two-pass within a tile, and tiles are merged as Chan,
Golub and LeVeque 1979 do, in a fixed order: no atomics, the same bits in every run.

Layouts: x and its gradient are [B,C,H,W]; what lies between x and the pointwise convolution's output (y, z, their
gradients, scratch g) is [C,B,H,W], one channel in one piece. Arithmetic and statistics are in the type ACC of the
statistics (fp32; fp64 under the interpreter). UPCAST multiplies in that type too: the interpreter can't multiply bf16.
Offsets within a channel are 32-bit: tensors have fewer than 2**31 elements (`convmixer.supported`).
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


# Where a tile lies.


@triton.jit
def rows(start, B, H: tl.constexpr, BB: tl.constexpr):
    """Image, row of the plane and whether the image exists, for the rows of the tile of images start .. start+BB."""
    row = tl.arange(0, BB * H)
    image = start + row // H
    return image, row % H, image < B


@triton.jit
def inner_planes(c, image, C, H: tl.constexpr, W: tl.constexpr):
    """Where the planes of channel c start in a [B,C,H,W] tensor."""
    return (image * C + c) * H * W


@triton.jit
def outer_planes(c, image, B, H: tl.constexpr, W: tl.constexpr):
    """Where the planes of channel c start in a [C,B,H,W] tensor."""
    return (c * B + image) * H * W


@triton.jit
def elements(planes, h, W: tl.constexpr):
    """Where the elements of rows h of the planes lie."""
    return planes[:, None] + (h[:, None] * W + tl.arange(0, W)[None, :])


@triton.jit
def load(ptr, at, inside, ACC: tl.constexpr):
    return tl.load(ptr + at, mask=inside[:, None], other=0.0).to(ACC)


@triton.jit
def load_biased(ptr, at, inside, bias_ptr, c, ACC: tl.constexpr):
    """z + bias."""
    return load(ptr, at, inside, ACC) + tl.load(bias_ptr + c).to(ACC)


# BatchNorm of one channel.


@triton.jit
def statistics(values, inside, count):
    """Mean and sum of squared deviations of the `count` values that are `inside`; two passes."""
    mean = tl.sum(tl.where(inside[:, None], values, 0.0)) / count
    deviation = tl.where(inside[:, None], values - mean, 0.0)
    return mean, tl.sum(deviation * deviation)


@triton.jit
def merge(count, mean, m2, values, inside, images, H: tl.constexpr, W: tl.constexpr):
    """Statistics of a set of values and those of a tile of `images` from those of each."""
    count_b = (images * H * W).to(mean.dtype)
    mean_b, m2_b = statistics(values, inside, count_b)
    total = count + count_b
    delta = mean_b - mean
    return total, mean + delta * (count_b / total), m2 + m2_b + delta * delta * (count * count_b / total)


@triton.jit
def store_statistics(stats_ptr, c, C, count, mean, m2):
    """Row by row of stats [3,C]: mean, biased variance, unbiased variance (for the running one)."""
    tl.store(stats_ptr + c, mean)
    tl.store(stats_ptr + C + c, m2 / count)
    tl.store(stats_ptr + 2 * C + c, m2 / (count - 1))


@triton.jit
def load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC: tl.constexpr):
    """Mean, 1 / standard deviation, and gamma times that."""
    rstd = 1.0 / tl.sqrt(tl.load(stats_ptr + C + c) + eps)
    return tl.load(stats_ptr + c), rstd, rstd * tl.load(gamma_ptr + c).to(ACC)


@triton.jit
def normalised_by_own(values, inside, stats_ptr, gamma_ptr, beta_ptr, c, C, count, eps):
    """BN of `values`, which are all of the channel; writes their statistics."""
    mean, m2 = statistics(values, inside, count)
    store_statistics(stats_ptr, c, C, count, mean, m2)
    scale = tl.load(gamma_ptr + c).to(mean.dtype) / tl.sqrt(m2 / count + eps)
    return (values - mean) * scale + tl.load(beta_ptr + c).to(mean.dtype)


@triton.jit
def gelu_statistics(
    z_ptr, bias_ptr, stats_ptr, c, B, C, H: tl.constexpr, W: tl.constexpr, BB: tl.constexpr, ACC: tl.constexpr
):
    """Writes the statistics of GELU(z + bias) of channel c."""
    count = tl.zeros((), ACC)
    mean = tl.zeros((), ACC)
    m2 = tl.zeros((), ACC)
    for start in range(0, B, BB):
        image, h, inside = rows(start, B, H, BB)
        at = elements(outer_planes(c, image, B, H, W), h, W)
        activated = gelu(load_biased(z_ptr, at, inside, bias_ptr, c, ACC))
        count, mean, m2 = merge(count, mean, m2, activated, inside, tl.minimum(B - start, BB), H, W)
    store_statistics(stats_ptr, c, C, count, mean, m2)


@triton.jit
def through_norm_and_gelu(gradient, value, normal, mean, mean_normal, scale, inside):
    """Gradient to `value` from that to BN(GELU(value)), whose means over the batch, by itself and times normal, go off.

    `normal` is the norm's output before gamma and beta.
    """
    gradient = (gradient - mean - normal * mean_normal) * scale * gelu_derivative(value)
    return tl.where(inside[:, None], gradient, 0.0)


@triton.jit
def store_sums(dbeta_ptr, dgamma_ptr, sums_ptr, c, C, dbeta, dgamma):
    """To the gradients of the parameters, and to sums [2,C], which ranks average."""
    tl.store(dbeta_ptr + c, dbeta)
    tl.store(dgamma_ptr + c, dgamma)
    tl.store(sums_ptr + c, dbeta)
    tl.store(sums_ptr + C + c, dgamma)


@triton.jit
def norm_input_gradient(
    z_ptr, bias_ptr, gamma_ptr, stats_ptr, gradient_ptr, dz_ptr, dbias_ptr, sums_ptr, count, eps, c, B, C,
    OUTER: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz and dbias of BN(GELU(z + bias)); its gradient is [C,B,H,W] if OUTER, and dz may take its place."""
    mean, rstd, scale = load_statistics(stats_ptr, gamma_ptr, c, C, eps, ACC)
    mean_gradient = tl.load(sums_ptr + c) / count
    mean_gradient_normal = tl.load(sums_ptr + C + c) / count
    dbias = tl.zeros((), ACC)
    for start in range(0, B, BB):
        image, h, inside = rows(start, B, H, BB)
        z_at = elements(outer_planes(c, image, B, H, W), h, W)
        x_at = elements(inner_planes(c, image, C, H, W), h, W)
        z = load_biased(z_ptr, z_at, inside, bias_ptr, c, ACC)
        gradient = load(gradient_ptr, z_at if OUTER else x_at, inside, ACC)
        tl.debug_barrier()
        normal = (gelu(z) - mean) * rstd
        dz = through_norm_and_gelu(gradient, z, normal, mean_gradient, mean_gradient_normal, scale, inside)
        dbias += tl.sum(dz)
        tl.store(dz_ptr + z_at, dz, mask=inside[:, None])
    tl.store(dbias_ptr + c, dbias)


# Depthwise convolution.


@triton.jit
def shifted(ptr, plane, h, shift, inside, H: tl.constexpr, W: tl.constexpr):
    """Rows h + shift of the planes that start at `plane`, zero where a plane has no such row."""
    row = h + shift
    mask = inside & (row >= 0) & (row < H)
    return tl.load(ptr + (plane + row * W)[:, None] + tl.arange(0, W)[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def band(weight_ptr, kh, W: tl.constexpr, K: tl.constexpr, MIRRORED: tl.constexpr):
    """The banded Toeplitz matrix of row kh of the taps, [column read, column written]."""
    i = tl.arange(0, W)[:, None]
    j = tl.arange(0, W)[None, :]
    kw = (j - i if MIRRORED else i - j) + K // 2
    return tl.load(weight_ptr + kh * K + kw, mask=(kw >= 0) & (kw < K), other=0.0)


@triton.jit
def depthwise(
    x_ptr, plane, weight_ptr, bias_ptr, c, h, inside,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution of the tile's planes plus bias; `weight_ptr` is [C,K,K]."""
    mixed = tl.zeros((BB * H, W), ACC)
    for kh in range(K):
        x = shifted(x_ptr, plane, h, kh - K // 2, inside, H, W)
        if UPCAST:
            x = x.to(ACC)
        taps = band(weight_ptr + c * K * K, kh, W, K, False).to(x.dtype)
        mixed = tl.dot(x, taps, mixed, input_precision="ieee", out_dtype=ACC)
    return mixed + tl.load(bias_ptr + c).to(ACC)


@triton.jit
def depthwise_gradients(
    dx, dweight, g, g_ptr, g_plane, x_ptr, x_plane, weight_ptr, c, h, inside,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dx and dweight [16,16] (its first K rows and columns) plus what the tile's gradient `g` adds to them.

    `g` is also in memory at `g_ptr`, for the shifts.
    """
    if UPCAST:
        g = g.to(dx.dtype)
    g_transposed = tl.trans(g)
    tap = tl.arange(0, 16)
    column = tl.arange(0, W)[:, None] + tap[None, :] - K // 2  # read by tap kw for output column i
    on_diagonal = (column >= 0) & (column < W) & (tap < K)[None, :]
    column = tl.where(on_diagonal, column, 0)
    for kh in range(K):
        shifted_g = shifted(g_ptr, g_plane, h, K // 2 - kh, inside, H, W)
        shifted_x = shifted(x_ptr, x_plane, h, kh - K // 2, inside, H, W)
        if UPCAST:
            shifted_g = shifted_g.to(dx.dtype)
            shifted_x = shifted_x.to(dx.dtype)
        taps = band(weight_ptr + c * K * K, kh, W, K, True).to(shifted_g.dtype)
        dx = tl.dot(shifted_g, taps, dx, input_precision="ieee", out_dtype=dx.dtype)
        # [column written, column read]
        products = tl.dot(g_transposed, shifted_x, input_precision="ieee", out_dtype=dx.dtype)
        diagonals = tl.where(on_diagonal, tl.gather(products, column, 1), 0.0)
        dweight += tl.where((tap == kh)[:, None], tl.sum(diagonals, axis=0)[None, :], 0.0)
    return dx, dweight


@triton.jit
def store_dweight(dweight_ptr, c, dweight, K: tl.constexpr):
    kh = tl.arange(0, 16)[:, None]
    kw = tl.arange(0, 16)[None, :]
    tl.store(dweight_ptr + c * K * K + kh * K + kw, dweight, mask=(kh < K) & (kw < K))
