"""The Triton kernels of a ConvMixer layer. `convmixer` says what they are for and launches them.

BatchNorm and the depthwise convolution both work on one channel at a time, so the program that owns a channel does all
but the pointwise convolution without a word to the others: no atomics, no partial sums of other programs, the same bits
in every run. Rows of a tile are (image, row of the plane), its columns the W columns of the plane.

**Depthwise convolution on tensor cores.** For each of the K rows of taps the plane, shifted by that row, is multiplied
by the banded Toeplitz matrix T[i,j] = w[kh, i-j+P], P = K // 2, which is built in registers; zero padding is the mask
of the shifted load and the band's end. The gradient of the input is the same with shifts and band mirrored. The
gradient of w[kh,:] lies on the diagonals of g^T shift(x), also a matrix product.

**Shifted loads** read what the program itself has stored in device memory, after a barrier (L1 and L2 serve them). What
is overwritten in place is read before a barrier. Statistics are two-pass within a tile, and tiles are merged as Chan,
Golub and LeVeque 1979 do, in a fixed order.

Layouts: x and its gradient are [B,C,H,W]; what lies between x and the pointwise convolution's output (y, z, their
gradients, scratch g) is [C,B,H,W], one channel in one piece. Arithmetic and statistics are in the type of the
statistics (fp32; fp64 under the interpreter). UPCAST multiplies in that type too: the interpreter can't multiply bf16.
Offsets within a channel are 32-bit: tensors have fewer than 2**31 elements (`convmixer.supported`).
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_derivative(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _rows(start, B, H: tl.constexpr, BB: tl.constexpr):
    """Image, row of the plane and whether the image exists, for the rows of the tile of images start .. start+BB."""
    row = tl.arange(0, BB * H)
    image = start + row // H
    return image, row % H, image < B


@triton.jit
def _statistics(values, inside, count):
    """Mean and sum of squared deviations of the `count` values that are `inside` [rows,1]; two passes."""
    mean = tl.sum(tl.where(inside, values, 0.0)) / count
    deviation = tl.where(inside, values - mean, 0.0)
    return mean, tl.sum(deviation * deviation)


@triton.jit
def _merge(count, mean, m2, count_b, mean_b, m2_b):
    """Statistics of two sets of values from those of each."""
    total = count + count_b
    delta = mean_b - mean
    return total, mean + delta * (count_b / total), m2 + m2_b + delta * delta * (count * count_b / total)


@triton.jit
def _store_statistics(stats_ptr, c, C, count, mean, m2):
    """Row by row of stats [3,C]: mean, biased variance, unbiased variance (for the running one)."""
    tl.store(stats_ptr + c, mean)
    tl.store(stats_ptr + C + c, m2 / count)
    tl.store(stats_ptr + 2 * C + c, m2 / (count - 1))


@triton.jit
def _shifted(ptr, plane, h, shift, inside, H: tl.constexpr, W: tl.constexpr):
    """Rows h + shift of the planes that start at `plane`, zero where a plane has no such row."""
    row = h + shift
    mask = inside & (row >= 0) & (row < H)
    return tl.load(ptr + (plane + row * W)[:, None] + tl.arange(0, W)[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def _band(weight_ptr, kh, W: tl.constexpr, K: tl.constexpr, MIRRORED: tl.constexpr):
    """The banded Toeplitz matrix of row kh of the taps, [column read, column written]."""
    i = tl.arange(0, W)[:, None]
    j = tl.arange(0, W)[None, :]
    kw = (j - i if MIRRORED else i - j) + K // 2
    return tl.load(weight_ptr + kh * K + kw, mask=(kw >= 0) & (kw < K), other=0.0)


@triton.jit
def _depthwise(
    accumulator,
    x_ptr,
    weight_ptr,
    plane,
    h,
    inside,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """accumulator + the depthwise convolution of the tile's planes; `weight_ptr` is the channel's [K,K]."""
    for kh in range(K):
        x = _shifted(x_ptr, plane, h, kh - K // 2, inside, H, W)
        if UPCAST:
            x = x.to(accumulator.dtype)
        band = _band(weight_ptr, kh, W, K, False).to(x.dtype)
        accumulator = tl.dot(x, band, accumulator, input_precision="ieee", out_dtype=accumulator.dtype)
    return accumulator


@triton.jit
def _depthwise_gradients(
    dx,
    dweight,
    g,
    g_ptr,
    g_plane,
    x_ptr,
    x_plane,
    weight_ptr,
    h,
    inside,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    UPCAST: tl.constexpr,
):
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
        shifted_g = _shifted(g_ptr, g_plane, h, K // 2 - kh, inside, H, W)
        shifted_x = _shifted(x_ptr, x_plane, h, kh - K // 2, inside, H, W)
        if UPCAST:
            shifted_g = shifted_g.to(dx.dtype)
            shifted_x = shifted_x.to(dx.dtype)
        band = _band(weight_ptr, kh, W, K, True).to(shifted_g.dtype)
        dx = tl.dot(shifted_g, band, dx, input_precision="ieee", out_dtype=dx.dtype)
        # [column written, column read]
        products = tl.dot(g_transposed, shifted_x, input_precision="ieee", out_dtype=dx.dtype)
        diagonals = tl.where(on_diagonal, tl.gather(products, column, 1), 0.0)
        dweight += tl.where((tap == kh)[:, None], tl.sum(diagonals, axis=0)[None, :], 0.0)
    return dx, dweight


@triton.jit
def _store_dweight(dweight_ptr, c, dweight, K: tl.constexpr):
    kh = tl.arange(0, 16)[:, None]
    kw = tl.arange(0, 16)[None, :]
    tl.store(dweight_ptr + c * K * K + kh * K + kw, dweight, mask=(kh < K) & (kw < K))


@triton.jit
def _normalised(z_ptr, at, mask, c, bias_ptr, mean, scale, beta_ptr):
    """BN(GELU(z + bias)) of a tile, from its mean and its scale gamma / standard deviation."""
    z = tl.load(z_ptr + at, mask=mask, other=0.0).to(mean.dtype) + tl.load(bias_ptr + c).to(mean.dtype)
    return (_gelu(z) - mean) * scale + tl.load(beta_ptr + c).to(mean.dtype)


@triton.jit
def _gelu_statistics(z_ptr, bias_ptr, stats_ptr, c, B, C, H: tl.constexpr, W: tl.constexpr, BB: tl.constexpr):
    """Writes the statistics of GELU(z + bias) of channel c."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    bias = tl.load(bias_ptr + c).to(ACC)
    count = tl.zeros((), ACC)
    mean = tl.zeros((), ACC)
    m2 = tl.zeros((), ACC)
    for start in range(0, B, BB):
        image, h, inside = _rows(start, B, H, BB)
        at = ((c * B + image) * H * W + h * W)[:, None] + tl.arange(0, W)[None, :]
        activated = _gelu(tl.load(z_ptr + at, mask=inside[:, None], other=0.0).to(ACC) + bias)
        here = (tl.minimum(B - start, BB) * H * W).to(ACC)
        tile_mean, tile_m2 = _statistics(activated, inside[:, None], here)
        count, mean, m2 = _merge(count, mean, m2, here, tile_mean, tile_m2)
    _store_statistics(stats_ptr, c, C, count, mean, m2)


# Training forward, all images of a channel in the registers of one program.


@triton.jit
def forward_resident(
    z_ptr,
    pre_bias_ptr,
    pre_gamma_ptr,
    pre_beta_ptr,
    pre_stats_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    beta_ptr,
    stats_ptr,
    y_ptr,
    pre_eps,
    eps,
    B,
    C,
    NORM: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    BB: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """With NORM, x = BN(GELU(z + pre_bias)), else x is given. Then y = x + BN(GELU(depthwise(x) + bias)).

    Writes x (with NORM), y, and the statistics of both norms, [3,C] (`_store_statistics`).
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    image, h, inside = _rows(0, B, H, BB)
    mask = inside[:, None]
    inner = h[:, None] * W + tl.arange(0, W)[None, :]
    x_plane = (image * C + c) * H * W
    y_plane = (c * B + image) * H * W
    x_at = x_plane[:, None] + inner
    y_at = y_plane[:, None] + inner
    count = (B * H * W).to(ACC)
    if NORM:
        z = tl.load(z_ptr + y_at, mask=mask, other=0.0).to(ACC) + tl.load(pre_bias_ptr + c).to(ACC)
        activated = _gelu(z)
        mean, m2 = _statistics(activated, mask, count)
        _store_statistics(pre_stats_ptr, c, C, count, mean, m2)
        scale = tl.load(pre_gamma_ptr + c).to(ACC) / tl.sqrt(m2 / count + pre_eps)
        x = (activated - mean) * scale + tl.load(pre_beta_ptr + c).to(ACC)
        tl.store(x_ptr + x_at, x, mask=mask)
        tl.debug_barrier()
    else:
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(ACC)
    zero = tl.zeros((BB * H, W), ACC)
    mixed = _depthwise(zero, x_ptr, weight_ptr + c * K * K, x_plane, h, inside, H, W, K, UPCAST)
    activated = _gelu(mixed + tl.load(bias_ptr + c).to(ACC))
    mean, m2 = _statistics(activated, mask, count)
    _store_statistics(stats_ptr, c, C, count, mean, m2)
    scale = tl.load(gamma_ptr + c).to(ACC) / tl.sqrt(m2 / count + eps)
    tl.store(y_ptr + y_at, (activated - mean) * scale + tl.load(beta_ptr + c).to(ACC) + x, mask=mask)


# Training forward, image by image group: any batch, and with the statistics of other ranks.


@triton.jit
def forward_staged(
    z_ptr,
    pre_bias_ptr,
    pre_gamma_ptr,
    pre_beta_ptr,
    pre_stats_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    beta_ptr,
    stats_ptr,
    y_ptr,
    pre_eps,
    eps,
    B,
    C,
    NORM: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    BB: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What `forward_resident` does, in the stages FIRST to LAST of three, each over groups of BB images.

    0: statistics of GELU(z); 1: x, the convolution, and the statistics of its GELU, which waits in y; 2: y. Statistics
    pass from stage to stage through memory, where ranks merge theirs between two launches.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    if NORM and FIRST == 0:
        _gelu_statistics(z_ptr, pre_bias_ptr, pre_stats_ptr, c, B, C, H, W, BB)
        tl.debug_barrier()
    if FIRST <= 1 and LAST >= 1:
        bias = tl.load(bias_ptr + c).to(ACC)
        if NORM:
            pre_mean = tl.load(pre_stats_ptr + c)
            pre_scale = tl.load(pre_gamma_ptr + c).to(ACC) / tl.sqrt(tl.load(pre_stats_ptr + C + c) + pre_eps)
        count = tl.zeros((), ACC)
        mean = tl.zeros((), ACC)
        m2 = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, inside = _rows(start, B, H, BB)
            inner = h[:, None] * W + tl.arange(0, W)[None, :]
            x_plane = (image * C + c) * H * W
            y_at = ((c * B + image) * H * W)[:, None] + inner
            if NORM:
                x = _normalised(z_ptr, y_at, inside[:, None], c, pre_bias_ptr, pre_mean, pre_scale, pre_beta_ptr)
                tl.store(x_ptr + x_plane[:, None] + inner, x, mask=inside[:, None])
                tl.debug_barrier()
            zero = tl.zeros((BB * H, W), ACC)
            mixed = _depthwise(zero, x_ptr, weight_ptr + c * K * K, x_plane, h, inside, H, W, K, UPCAST)
            activated = _gelu(mixed + bias)
            tl.store(y_ptr + y_at, activated, mask=inside[:, None])
            here = (tl.minimum(B - start, BB) * H * W).to(ACC)
            tile_mean, tile_m2 = _statistics(activated, inside[:, None], here)
            count, mean, m2 = _merge(count, mean, m2, here, tile_mean, tile_m2)
        _store_statistics(stats_ptr, c, C, count, mean, m2)
        tl.debug_barrier()
    if LAST == 2:
        mean = tl.load(stats_ptr + c)
        scale = tl.load(gamma_ptr + c).to(ACC) / tl.sqrt(tl.load(stats_ptr + C + c) + eps)
        beta = tl.load(beta_ptr + c).to(ACC)
        for start in range(0, B, BB):
            image, h, inside = _rows(start, B, H, BB)
            inner = h[:, None] * W + tl.arange(0, W)[None, :]
            x_at = ((image * C + c) * H * W)[:, None] + inner
            y_at = ((c * B + image) * H * W)[:, None] + inner
            x = tl.load(x_ptr + x_at, mask=inside[:, None], other=0.0).to(ACC)
            activated = tl.load(y_ptr + y_at, mask=inside[:, None], other=0.0).to(ACC)
            tl.debug_barrier()
            tl.store(y_ptr + y_at, (activated - mean) * scale + beta + x, mask=inside[:, None])


# Training backward.


@triton.jit
def backward_resident(
    z_ptr,
    pre_bias_ptr,
    pre_gamma_ptr,
    pre_beta_ptr,
    pre_stats_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    stats_ptr,
    dy_ptr,
    dtap_ptr,
    g_ptr,
    dz_ptr,
    dpre_bias_ptr,
    dpre_gamma_ptr,
    dpre_beta_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dgamma_ptr,
    dbeta_ptr,
    pre_eps,
    eps,
    B,
    C,
    NORM: tl.constexpr,
    TAP: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    BB: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of `forward_resident` from dy and, with TAP, from dtap, the gradient of x as an output.

    Recomputes all but the statistics from z (with NORM, x is scratch then) or x. g is scratch: the gradient of the
    convolution's output. Writes dz (NORM) or dx, and every parameter's gradient.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    image, h, inside = _rows(0, B, H, BB)
    mask = inside[:, None]
    inner = h[:, None] * W + tl.arange(0, W)[None, :]
    x_plane = (image * C + c) * H * W
    y_plane = (c * B + image) * H * W
    x_at = x_plane[:, None] + inner
    y_at = y_plane[:, None] + inner
    count = (B * H * W).to(ACC)
    if NORM:
        pre_bias = tl.load(pre_bias_ptr + c).to(ACC)
        pre_mean = tl.load(pre_stats_ptr + c)
        pre_rstd = 1.0 / tl.sqrt(tl.load(pre_stats_ptr + C + c) + pre_eps)
        pre_scale = pre_rstd * tl.load(pre_gamma_ptr + c).to(ACC)
        x = _normalised(z_ptr, y_at, mask, c, pre_bias_ptr, pre_mean, pre_scale, pre_beta_ptr)
        tl.store(x_ptr + x_at, x, mask=mask)
        tl.debug_barrier()
    zero = tl.zeros((BB * H, W), ACC)
    mixed = _depthwise(zero, x_ptr, weight_ptr + c * K * K, x_plane, h, inside, H, W, K, UPCAST)
    mixed += tl.load(bias_ptr + c).to(ACC)
    rstd = 1.0 / tl.sqrt(tl.load(stats_ptr + C + c) + eps)
    normal = tl.where(mask, (_gelu(mixed) - tl.load(stats_ptr + c)) * rstd, 0.0)
    dy = tl.load(dy_ptr + y_at, mask=mask, other=0.0).to(ACC)
    dbeta = tl.sum(dy)
    dgamma = tl.sum(dy * normal)
    tl.store(dbeta_ptr + c, dbeta)
    tl.store(dgamma_ptr + c, dgamma)
    g = (dy - dbeta / count - normal * (dgamma / count)) * (rstd * tl.load(gamma_ptr + c).to(ACC))
    g = tl.where(mask, g * _gelu_derivative(mixed), 0.0)
    tl.store(dbias_ptr + c, tl.sum(g))
    g = g.to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + y_at, g, mask=mask)
    tl.debug_barrier()
    dx = dy
    if TAP:
        dx += tl.load(dtap_ptr + x_at, mask=mask, other=0.0).to(ACC)
    dx, dweight = _depthwise_gradients(
        dx,
        tl.zeros((16, 16), ACC),
        g,
        g_ptr,
        y_plane,
        x_ptr,
        x_plane,
        weight_ptr + c * K * K,
        h,
        inside,
        H,
        W,
        K,
        UPCAST,
    )
    _store_dweight(dweight_ptr, c, dweight, K)
    if NORM:
        z = tl.load(z_ptr + y_at, mask=mask, other=0.0).to(ACC) + pre_bias
        normal = tl.where(mask, (_gelu(z) - pre_mean) * pre_rstd, 0.0)
        dx = tl.where(mask, dx, 0.0)
        dbeta = tl.sum(dx)
        dgamma = tl.sum(dx * normal)
        tl.store(dpre_beta_ptr + c, dbeta)
        tl.store(dpre_gamma_ptr + c, dgamma)
        dz = (dx - dbeta / count - normal * (dgamma / count)) * pre_scale
        dz = tl.where(mask, dz * _gelu_derivative(z), 0.0)
        tl.store(dpre_bias_ptr + c, tl.sum(dz))
        tl.store(dz_ptr + y_at, dz, mask=mask)
    else:
        tl.store(dx_ptr + x_at, dx, mask=mask)


@triton.jit
def backward_staged(
    z_ptr,
    pre_bias_ptr,
    pre_gamma_ptr,
    pre_beta_ptr,
    pre_stats_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    stats_ptr,
    dy_ptr,
    dtap_ptr,
    g_ptr,
    dz_ptr,
    dpre_bias_ptr,
    dpre_gamma_ptr,
    dpre_beta_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dgamma_ptr,
    dbeta_ptr,
    pre_sums_ptr,
    sums_ptr,
    count,
    pre_eps,
    eps,
    B,
    C,
    NORM: tl.constexpr,
    TAP: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    BB: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What `backward_resident` does, in the stages FIRST to LAST of three, each over groups of BB images.

    0: the convolution again, which waits in g, and the sums of its norm; 1: g, dx, dweight, and the sums of the norm of
    z; 2 (NORM): dz, in whose place dx has waited. A norm's sums [2,C] are dbeta and dgamma over all ranks, `count` the
    values of a channel on all ranks.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    mean = tl.load(stats_ptr + c)
    rstd = 1.0 / tl.sqrt(tl.load(stats_ptr + C + c) + eps)
    if NORM:
        pre_bias = tl.load(pre_bias_ptr + c).to(ACC)
        pre_mean = tl.load(pre_stats_ptr + c)
        pre_rstd = 1.0 / tl.sqrt(tl.load(pre_stats_ptr + C + c) + pre_eps)
        pre_scale = pre_rstd * tl.load(pre_gamma_ptr + c).to(ACC)
    if FIRST == 0:
        bias = tl.load(bias_ptr + c).to(ACC)
        dbeta = tl.zeros((), ACC)
        dgamma = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, inside = _rows(start, B, H, BB)
            mask = inside[:, None]
            inner = h[:, None] * W + tl.arange(0, W)[None, :]
            x_plane = (image * C + c) * H * W
            y_at = ((c * B + image) * H * W)[:, None] + inner
            if NORM:
                x = _normalised(z_ptr, y_at, mask, c, pre_bias_ptr, pre_mean, pre_scale, pre_beta_ptr)
                tl.store(x_ptr + x_plane[:, None] + inner, x, mask=mask)
                tl.debug_barrier()
            zero = tl.zeros((BB * H, W), ACC)
            mixed = _depthwise(zero, x_ptr, weight_ptr + c * K * K, x_plane, h, inside, H, W, K, UPCAST)
            mixed += bias
            tl.store(g_ptr + y_at, mixed, mask=mask)
            dy = tl.load(dy_ptr + y_at, mask=mask, other=0.0).to(ACC)
            dbeta += tl.sum(dy)
            dgamma += tl.sum(dy * ((_gelu(mixed) - mean) * rstd))
        tl.store(dbeta_ptr + c, dbeta)
        tl.store(dgamma_ptr + c, dgamma)
        tl.store(sums_ptr + c, dbeta)
        tl.store(sums_ptr + C + c, dgamma)
        tl.debug_barrier()
    if FIRST <= 1 and LAST >= 1:
        mean_dy = tl.load(sums_ptr + c) / count
        mean_dy_normal = tl.load(sums_ptr + C + c) / count
        scale = rstd * tl.load(gamma_ptr + c).to(ACC)
        dbias = tl.zeros((), ACC)
        dweight = tl.zeros((16, 16), ACC)
        dbeta = tl.zeros((), ACC)
        dgamma = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, inside = _rows(start, B, H, BB)
            mask = inside[:, None]
            inner = h[:, None] * W + tl.arange(0, W)[None, :]
            x_plane = (image * C + c) * H * W
            y_plane = (c * B + image) * H * W
            x_at = x_plane[:, None] + inner
            y_at = y_plane[:, None] + inner
            dx = tl.load(dy_ptr + y_at, mask=mask, other=0.0).to(ACC)
            mixed = tl.load(g_ptr + y_at, mask=mask, other=0.0).to(ACC)
            tl.debug_barrier()
            normal = (_gelu(mixed) - mean) * rstd
            g = (dx - mean_dy - normal * mean_dy_normal) * scale * _gelu_derivative(mixed)
            g = tl.where(mask, g, 0.0)
            dbias += tl.sum(g)
            g = g.to(g_ptr.dtype.element_ty)
            tl.store(g_ptr + y_at, g, mask=mask)
            tl.debug_barrier()
            if TAP:
                dx += tl.load(dtap_ptr + x_at, mask=mask, other=0.0).to(ACC)
            dx, dweight = _depthwise_gradients(
                dx,
                dweight,
                g,
                g_ptr,
                y_plane,
                x_ptr,
                x_plane,
                weight_ptr + c * K * K,
                h,
                inside,
                H,
                W,
                K,
                UPCAST,
            )
            if NORM:
                z = tl.load(z_ptr + y_at, mask=mask, other=0.0).to(ACC) + pre_bias
                dx = tl.where(mask, dx, 0.0)
                dbeta += tl.sum(dx)
                dgamma += tl.sum(dx * ((_gelu(z) - pre_mean) * pre_rstd))
                tl.store(dz_ptr + y_at, dx, mask=mask)
            else:
                tl.store(dx_ptr + x_at, dx, mask=mask)
        _store_dweight(dweight_ptr, c, dweight, K)
        tl.store(dbias_ptr + c, dbias)
        if NORM:
            tl.store(dpre_beta_ptr + c, dbeta)
            tl.store(dpre_gamma_ptr + c, dgamma)
            tl.store(pre_sums_ptr + c, dbeta)
            tl.store(pre_sums_ptr + C + c, dgamma)
        tl.debug_barrier()
    if NORM and LAST == 2:
        mean_dx = tl.load(pre_sums_ptr + c) / count
        mean_dx_normal = tl.load(pre_sums_ptr + C + c) / count
        dpre_bias = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, inside = _rows(start, B, H, BB)
            mask = inside[:, None]
            y_at = ((c * B + image) * H * W + h * W)[:, None] + tl.arange(0, W)[None, :]
            z = tl.load(z_ptr + y_at, mask=mask, other=0.0).to(ACC) + pre_bias
            dx = tl.load(dz_ptr + y_at, mask=mask, other=0.0).to(ACC)
            tl.debug_barrier()
            normal = (_gelu(z) - pre_mean) * pre_rstd
            dz = (dx - mean_dx - normal * mean_dx_normal) * pre_scale * _gelu_derivative(z)
            dz = tl.where(mask, dz, 0.0)
            dpre_bias += tl.sum(dz)
            tl.store(dz_ptr + y_at, dz, mask=mask)
        tl.store(dpre_bias_ptr + c, dpre_bias)


# The norm that ends a run of layers.


@triton.jit
def norm_forward(
    z_ptr,
    bias_ptr,
    gamma_ptr,
    beta_ptr,
    stats_ptr,
    x_ptr,
    eps,
    B,
    C,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BB: tl.constexpr,
):
    """x = BN(GELU(z + bias)); stage 0 takes the statistics, stage 1 applies them."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    if FIRST == 0:
        _gelu_statistics(z_ptr, bias_ptr, stats_ptr, c, B, C, H, W, BB)
        tl.debug_barrier()
    if LAST == 1:
        mean = tl.load(stats_ptr + c)
        scale = tl.load(gamma_ptr + c).to(ACC) / tl.sqrt(tl.load(stats_ptr + C + c) + eps)
        for start in range(0, B, BB):
            image, h, inside = _rows(start, B, H, BB)
            inner = h[:, None] * W + tl.arange(0, W)[None, :]
            z_at = ((c * B + image) * H * W)[:, None] + inner
            x = _normalised(z_ptr, z_at, inside[:, None], c, bias_ptr, mean, scale, beta_ptr)
            tl.store(x_ptr + ((image * C + c) * H * W)[:, None] + inner, x, mask=inside[:, None])


@triton.jit
def norm_backward(
    z_ptr,
    bias_ptr,
    gamma_ptr,
    stats_ptr,
    dx_ptr,
    dz_ptr,
    dbias_ptr,
    dgamma_ptr,
    dbeta_ptr,
    sums_ptr,
    count,
    eps,
    B,
    C,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BB: tl.constexpr,
):
    """Gradients of `norm_forward`; stage 0 takes the sums, stage 1 (with those of all ranks) writes dz."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    c = tl.program_id(0)
    bias = tl.load(bias_ptr + c).to(ACC)
    mean = tl.load(stats_ptr + c)
    rstd = 1.0 / tl.sqrt(tl.load(stats_ptr + C + c) + eps)
    if FIRST == 0:
        dbeta = tl.zeros((), ACC)
        dgamma = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, inside = _rows(start, B, H, BB)
            inner = h[:, None] * W + tl.arange(0, W)[None, :]
            z_at = ((c * B + image) * H * W)[:, None] + inner
            z = tl.load(z_ptr + z_at, mask=inside[:, None], other=0.0).to(ACC) + bias
            dx_at = ((image * C + c) * H * W)[:, None] + inner
            dx = tl.load(dx_ptr + dx_at, mask=inside[:, None], other=0.0).to(ACC)
            dbeta += tl.sum(dx)
            dgamma += tl.sum(dx * ((_gelu(z) - mean) * rstd))
        tl.store(dbeta_ptr + c, dbeta)
        tl.store(dgamma_ptr + c, dgamma)
        tl.store(sums_ptr + c, dbeta)
        tl.store(sums_ptr + C + c, dgamma)
        tl.debug_barrier()
    if LAST == 1:
        mean_dx = tl.load(sums_ptr + c) / count
        mean_dx_normal = tl.load(sums_ptr + C + c) / count
        scale = rstd * tl.load(gamma_ptr + c).to(ACC)
        dbias = tl.zeros((), ACC)
        for start in range(0, B, BB):
            image, h, inside = _rows(start, B, H, BB)
            inner = h[:, None] * W + tl.arange(0, W)[None, :]
            z_at = ((c * B + image) * H * W)[:, None] + inner
            z = tl.load(z_ptr + z_at, mask=inside[:, None], other=0.0).to(ACC) + bias
            dx_at = ((image * C + c) * H * W)[:, None] + inner
            dx = tl.load(dx_ptr + dx_at, mask=inside[:, None], other=0.0).to(ACC)
            normal = (_gelu(z) - mean) * rstd
            dz = (dx - mean_dx - normal * mean_dx_normal) * scale * _gelu_derivative(z)
            dz = tl.where(inside[:, None], dz, 0.0)
            dbias += tl.sum(dz)
            tl.store(dz_ptr + z_at, dz, mask=inside[:, None])
        tl.store(dbias_ptr + c, dbias)


# Evaluation: the norms are a scale and a shift of each channel.


@triton.jit
def depthwise_evaluation(
    x_ptr,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    beta_ptr,
    mean_ptr,
    variance_ptr,
    y_ptr,
    eps,
    B,
    C,
    CHANNELS_OUTER: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    BB: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y [C,B,H,W] = x + BN(GELU(depthwise(x) + bias)), x [C,B,H,W] if CHANNELS_OUTER. Grid (C, groups of images)."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    c = tl.program_id(0)
    image, h, inside = _rows(tl.program_id(1) * BB, B, H, BB)
    inner = h[:, None] * W + tl.arange(0, W)[None, :]
    x_plane = (c * B + image if CHANNELS_OUTER else image * C + c) * H * W
    x = tl.load(x_ptr + x_plane[:, None] + inner, mask=inside[:, None], other=0.0).to(ACC)
    zero = tl.zeros((BB * H, W), ACC)
    mixed = _depthwise(zero, x_ptr, weight_ptr + c * K * K, x_plane, h, inside, H, W, K, UPCAST)
    activated = _gelu(mixed + tl.load(bias_ptr + c).to(ACC))
    scale = tl.load(gamma_ptr + c).to(ACC) / tl.sqrt(tl.load(variance_ptr + c).to(ACC) + eps)
    shift = tl.load(beta_ptr + c).to(ACC) - tl.load(mean_ptr + c).to(ACC) * scale
    y_at = ((c * B + image) * H * W)[:, None] + inner
    tl.store(y_ptr + y_at, activated * scale + shift + x, mask=inside[:, None])


@triton.jit
def pointwise_evaluation(
    y_ptr,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    beta_ptr,
    mean_ptr,
    variance_ptr,
    x_ptr,
    eps,
    C,
    N,
    CHANNELS_OUTER: tl.constexpr,
    HW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """x = BN(GELU(weight [C,C] @ y [C,N] + bias)), N = B H W; x is [C,B,H,W] if CHANNELS_OUTER, else [B,C,H,W].

    Grid (tiles of rows, tiles of columns): programs that run together share the columns of y.
    """
    ACC: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    accumulator = tl.zeros((BM, BN), ACC)
    for start in range(0, C, BK):
        weight_mask = (m < C)[:, None] & (start + k < C)[None, :]
        weight = tl.load(weight_ptr + m[:, None] * C + (start + k)[None, :], mask=weight_mask, other=0.0)
        y_mask = (start + k < C)[:, None] & (n < N)[None, :]
        y = tl.load(y_ptr + (start + k)[:, None] * N + n[None, :], mask=y_mask, other=0.0)
        if UPCAST:
            weight = weight.to(ACC)
            y = y.to(ACC)
        accumulator = tl.dot(weight, y, accumulator, input_precision="ieee", out_dtype=ACC)
    bias = tl.load(bias_ptr + m, mask=m < C, other=0.0).to(ACC)
    variance = tl.load(variance_ptr + m, mask=m < C, other=1.0).to(ACC)
    scale = tl.load(gamma_ptr + m, mask=m < C, other=0.0).to(ACC) / tl.sqrt(variance + eps)
    mean = tl.load(mean_ptr + m, mask=m < C, other=0.0).to(ACC)
    shift = tl.load(beta_ptr + m, mask=m < C, other=0.0).to(ACC) - mean * scale
    x = _gelu(accumulator + bias[:, None]) * scale[:, None] + shift[:, None]
    columns = n if CHANNELS_OUTER else n // HW * C * HW + n % HW
    x_at = m[:, None] * (N if CHANNELS_OUTER else HW) + columns[None, :]
    tl.store(x_ptr + x_at, x, mask=(m < C)[:, None] & (n < N)[None, :])
