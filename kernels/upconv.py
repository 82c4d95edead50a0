"""Nearest x2 upsampling followed by a 3x3 convolution, as four 2x2 convolutions of the small map.

Upsampling repeats each pixel, so the nine taps of an output pixel read only four different pixels of the small map, and
which four depends on whether its row and column are even or odd. In one dimension, with taps w0, w1, w2:

    even output 2i   reads x[i-1], x[i]   with w0, w1 + w2
    odd output 2i+1  reads x[i], x[i+1]   with w0 + w1, w2

The upsampled map never exists, and of the 36 multiply-adds of four output pixels 16 are left, and those of one more row
and column of the small map, because one convolution does all phases. It is exact, also at the border: the zeros around
the upsampled map are those around the small one. Gradients come from autograd. The 3x3 weight stays the only parameter,
so state dicts do not change.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def phase_weights(weight: Tensor) -> Tensor:
    """The 2x2 kernels [2,2,O,C,2,2] (row parity, column parity, ...) that replace `weight` [O,C,3,3]."""
    fold = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [parity, tap of two, tap of three]
    return torch.einsum("prh,qsw,ochw->pqocrs", fold, fold, weight)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B,C,H,W] -> [B,O,2H,2W], equal to `reference.upsample_conv`; `weight` [O,C,3,3], `bias` [O]."""
    batch, _, height, width = x.shape
    out = weight.shape[0]
    kernels = phase_weights(weight).flatten(0, 2)  # [4 O, C, 2, 2]
    # One convolution for all phases. Row i of its [H+1, W+1] result has read rows i-1 and i of x.
    phases = F.conv2d(x, kernels, None if bias is None else bias.repeat(4), padding=1)
    phases = phases.unflatten(1, (2, 2, out))
    rows = [[phases[:, p, q, :, p : p + height, q : q + width] for q in (0, 1)] for p in (0, 1)]
    columns_joined = [torch.stack(row, dim=-1) for row in rows]  # [B,O,H,W,2]
    return torch.stack(columns_joined, dim=3).reshape(batch, out, 2 * height, 2 * width)
