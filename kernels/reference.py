"""The operations in plain PyTorch, in their input's precision. In float64 they are the oracles of the fused kernels.

Tensors are [B,C,H,W]. BatchNorm uses batch statistics over B, H and W with the biased variance, like torch in training
mode. Running statistics are left to the caller.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5  # torch's default for BatchNorm


def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Apply BatchNorm with the batch statistics of `x`; `gamma` and `beta` are [C]."""
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean(dim=(0, 2, 3), keepdim=True)
    x_hat = (x - mean) * (variance + EPS).rsqrt()
    return x_hat * gamma[None, :, None, None] + beta[None, :, None, None]


def convmixer_layer(
    x: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    depthwise_norm: tuple[Tensor, Tensor],
    pointwise: Tensor,
    pointwise_bias: Tensor,
    pointwise_norm: tuple[Tensor, Tensor],
) -> Tensor:
    """One ConvMixer layer (Eq. 3 and 4): x' = x + BN(GELU(depthwise(x))), then BN(GELU(pointwise(x'))).

    `depthwise` is [C,1,K,K] with odd K, `pointwise` is [C,C,1,1]; a norm is a (gamma, beta) pair.
    """
    channels, _, size, _ = depthwise.shape
    conv = F.conv2d(x, depthwise, depthwise_bias, padding=size // 2, groups=channels)
    x = x + batch_norm(F.gelu(conv), *depthwise_norm)
    return batch_norm(F.gelu(F.conv2d(x, pointwise, pointwise_bias)), *pointwise_norm)


def msag(
    x: Tensor,
    branches: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    vote: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Tensor:
    """The multi-scale attention gate (Eq. 5 and 6, with the BatchNorm after the vote that Table VII implies).

    `branches` are the pointwise, ordinary and dilated convolutions, `vote` the 1x1 convolution over all three. Each is
    (weight, bias, gamma, beta), with weights [C,C,1,1], [C,C,3,3], [C,C,3,3] and [C,3C,1,1].
    """
    scales = []
    for (weight, bias, gamma, beta), (padding, dilation) in zip(branches, ((0, 1), (1, 1), (2, 2)), strict=True):
        scales.append(batch_norm(F.conv2d(x, weight, bias, padding=padding, dilation=dilation), gamma, beta))
    weight, bias, gamma, beta = vote
    votes = batch_norm(F.conv2d(torch.cat(scales, dim=1).relu(), weight, bias), gamma, beta)
    return x + x * votes.sigmoid()


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Nearest x2 upsampling, then a 3x3 convolution with padding 1: [B,C,H,W] -> [B,O,2H,2W]; `weight` [O,C,3,3]."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
