"""BatchNorm of a convolution in training, without the convolution's bias b [C].

BatchNorm subtracts the mean of the batch, so a bias before it moves the running mean and nothing else:

    BN(u + b) = BN(u)       mean(u + b) = mean(u) + b       dL/db = sum of dL/du over pixels = 0

On a GPU, PyTorch adds the bias to the convolution's output in a kernel of its own and sums its gradient in another:
three passes over the map. On a CPU, the convolution adds it while it writes.
"""

from typing import Any

import torch
from torch import Tensor, nn

DEVICES: tuple[str, ...] = ("cuda",)
"""types of devices on which a convolution's bias costs kernels of its own"""


def bias_is_needed(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> bool:
    """Return whether `norm(conv(x))` depends on the bias, or is not faster without it."""
    if not norm.training or conv.bias is None or x.device.type not in DEVICES:
        return True
    return not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) or norm.momentum is None


def norm_of_convolution(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """Return norm(conv(x)), and update running statistics. Where the bias is left out, its gradient is exactly zero."""
    if bias_is_needed(x, conv, norm):
        return norm(conv(x))
    return norm_without_bias(conv._conv_forward(x, conv.weight, None), conv.bias, norm)


def norm_without_bias(u: Tensor, bias: Tensor | None, norm: Any) -> Tensor:
    """Return norm(u + bias) in training, and update running statistics."""
    y = norm(_ZeroGradient.apply(u, bias))
    if norm.track_running_stats:
        with torch.no_grad():
            # `data`, because autograd keeps the running mean, although the backward in training does not read it.
            norm.running_mean.data.add_(bias, alpha=norm.momentum)
    return y


class _ZeroGradient(torch.autograd.Function):
    """u; its backward also gives `bias` a gradient, zero. Without one, weight decay and DDP would leave it out."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, bias: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = bias.shape, bias.dtype  # ZeRO-3 frees the bias itself before the backward
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros(ctx.shape, dtype=ctx.dtype, device=gradient.device)
