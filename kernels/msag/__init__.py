"""The multi-scale attention gate: three convolutions of x, a vote over them, and a gate on x.

    u_i = conv_i(x)                 i = pointwise, ordinary 3x3, dilated 3x3; each C -> C       (Eq. 5)
    v   = sum_i W_i relu(norm_i(u_i)), W = the vote convolution, 3C -> C                        (Eq. 6)
    y   = x + x * sigmoid(norm_v(v))

**Memory layout.** Tensors are channels-last. Each row of memory is one pixel's C channels, so every convolution is a
matrix product whose A tile is a shifted tile of pixels. Weights are stored [out, tap, in] and read in that layout
forward and backward.

**Training, forward** cannot be a single kernel, because each norm needs all pixels first: convolution -> statistics ->
vote -> statistics -> gate. Each tile stores its count, mean and sum of squared deviations. One program per block of
channels merges them in a fixed order (Chan et al. 1979). There are no atomics, so results are bit-reproducible, and no
E[u²] - E[u]², so a large mean does not cancel digits. Bytes moved, in passes over a [B,C,H,W] tensor: read x and write
u (4), read u and write v (4), read x and v and write y (3); 11 in total. Eager PyTorch takes about 50. Floating-point
operations: 44 C² per pixel.

The convolution kernel computes its three branches one after another with one accumulator each. Reading the center tap
once for all three would save 2 of 19 reads, which come from L2. It would cost two more accumulators, so tiles of half
the size and twice the reads of every weight.

**Training, backward.** Saved are x, u, v and the two norm tables (5 tensors of x's size; eager saves about 9). The rest
is recomputed. With s = sigmoid(norm_v(v)), v̂ = (v - mean) / sigma, N pixels, and the same for each branch u_i:

    g   = dy x s (1 - s)                                         gradient w.r.t. norm_v(v)
    dv  = gamma / sigma (g - sum(g) / N - v̂ sum(g v̂) / N)
    g_i = [norm_i(u_i) > 0] W_i' dv                              gradient w.r.t. norm_i(u_i)
    du_i like dv, from g_i and û_i
    dx  = dy (1 + s) + sum_i conv_i'(du_i)

The backward of a norm needs two sums over all pixels first, so there are three steps: the sums of g, then dv; the
vote's gradient with the sums of g_i, then du (in place of g); then dx in one kernel with one accumulator for all 19
taps. The sums are also the gradients of gamma and beta. A bias before a batch-statistics norm has zero gradient. dy may
be a slice of a larger map, as the backward of `cat` returns it: the kernels take the distance of its pixels. Sums over
tiles and over the splits of the vote's weight gradient are added in a fixed order. The branches' weight gradients come
from the convolution library, which is near peak there; they are bit-reproducible with
torch.backends.cudnn.deterministic. In total 26 passes and twice the operations of the forward.

**Evaluation** uses running statistics: one kernel, two kernels, or ATen convolutions and one kernel. A convolution's
bias goes into the center of its norm. Nothing is folded into the weights, so nothing is rounded twice. Passes: 2 in one
kernel (read x, write y), 9 in two (u is written and read).
"""
