"""Fused ConvMixer layers: one Triton kernel and one matrix product forward, one kernel and two products backward.

    y = x + BN(GELU(depthwise(x)))        x' = BN(GELU(W y + b))                        (Eq. 3 and 4)

BatchNorm follows GELU, so it cannot be folded into the preceding convolution. It is a scale and shift in an epilogue.

**Fusion across layers.** Everything except W y works per channel. For z = W y of the previous layer, the program that
owns a channel computes x = BN(GELU(z + b)) and then y in one pass. A stack of L layers is

    x0 -mix-> y1 -matmul-> z1 -mix-> (x1, y2) -matmul-> z2 ... zL -norm-> xL

where every intermediate x is also an output, because decoders tap it. y and z are internal and stored as [C,B,H,W], so
the matrix product and both of its gradients are each one plain GEMM over all images. The kernel that reads z adds W's
bias and computes its gradient.

**Bytes moved, in passes over one activation tensor.** Forward, a layer within a stack takes 5: read z, write x and y
(mix); read y, write z (GEMM). The floor is 4; x is written because the shifted loads and the taps need it. A single
layer takes 6: read x, write y; GEMM; read z, write x'. Backward, a layer within a stack takes 5 in the kernel (read z
and dy, write and reread g and x mostly from cache, write dz) and 4 in the GEMMs. Eager PyTorch takes about 20 forward
and 30 backward. Saved for backward are z and y, 2 tensors per layer (3 for a single layer: x, y, z); eager saves 6.

**Memory layout.** x and its gradient are [B,C,H,W]. Everything between x and the pointwise convolution's output (y, z,
their gradients, scratch g) is [C,B,H,W], so that each channel is contiguous.

**Depthwise convolution on tensor cores.** For each of the K kernel rows, the plane shifted by that row is multiplied by
the banded Toeplitz matrix T[i,j] = w[kh, i-j+P] with P = K // 2, built in registers. Zero padding comes from the mask
of the shifted load and from the end of the band. The input gradient uses the same product with shifts and band
mirrored. The gradient of w[kh,:] is on the diagonals of g^T shift(x), also a matrix product.

**Shifted loads** read what the same program has stored to global memory, after a barrier; they hit L1 and L2. A tensor
that is overwritten in place is read before a barrier. Statistics are two-pass within a tile. Tiles are merged in a
fixed order as in Chan, Golub and LeVeque 1979, without atomics, so results are bit-reproducible.

**Backward.** Everything except the statistics is recomputed from z or x. With conv = depthwise(x) + bias and x_hat the
normalized value of a norm before gamma and beta:

    g  = BN'(dy, x_hat) GELU'(conv)                    dbias, dgamma and dbeta are sums over the channel
    dx = dy + dtap + g convolved with the mirrored kernel
    dw = the diagonals of g^T shift(x)
    dz = BN'(dx, x_hat of z) GELU'(z + pre_bias)

where BN'(d, x_hat) = gamma / sigma (d - mean(d) - x_hat mean(d x_hat)), with means over all ranks. dtap is the gradient
of x as an output of the stack.

**Numerics.** Statistics are two-pass or merged, in fp32, without atomics, so results are bit-reproducible. The
depthwise product takes operands in the activations' dtype and accumulates in fp32. Parameters may stay fp32 under
autocast.

With `SyncBatchNorm` on several ranks, training launches the kernels stage by stage. In between, the ranks' statistics
(count, mean, variance) are gathered and merged in rank order.
"""
