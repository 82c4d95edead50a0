"""Nearest x2 upsampling followed by a 3x3 convolution, computed as four 2x2 convolutions on the low-resolution map.

Upsampling repeats each pixel, so the nine taps of an output pixel read only four different input pixels. Which four
depends on the parity of its row and column (its phase). In one dimension, with taps w0, w1, w2:

    even output 2i   reads x[i-1], x[i]   with w0, w1 + w2
    odd output 2i+1  reads x[i], x[i+1]   with w0 + w1, w2

The upsampled map is never stored, and 16 of 36 multiply-adds per four output pixels remain. The result is exact, also
at the border: zero padding of the upsampled map is zero padding of the input. The 3x3 weight stays the only parameter,
so state dicts do not change. It is folded in its own precision, that is in float32 under autocast.

**PyTorch implementation** (training and evaluation). One convolution with 4 O channels computes all phases; its
[H+1, W+1] result is read in four shifted windows, which are interleaved. Four convolutions on shifted windows of x were
slower on a CPU, because the library copies each window. Saved for backward: x and the folded weights, and what the norm
and ReLU save; the upsampled map, four times x, is not. With P = B H W pixels of the input, forward takes 32 P C O
floating-point operations instead of 72 P C O.

**Triton implementation** (evaluation). An implicit GEMM, channels last: rows are pixels of the low-resolution map,
columns are output channels, and the reduction runs over 4 taps x C. Each program computes one phase. Bias and ReLU are
in the epilogue, and each output is written once. In bf16 it moves 2 P (C + 4 O) bytes plus weights. Nothing is saved.

In evaluation both fold BatchNorm into weight and bias, because it directly follows the convolution. The folded weights
are cached until a parameter changes.
"""
