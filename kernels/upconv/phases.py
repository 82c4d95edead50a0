"""The up-convolution as phase convolutions in PyTorch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def phase_weights(weight: Tensor) -> Tensor:
    """Return the equivalent 2x2 kernels [2,2,O,C,2,2] (row parity, column parity, ...) of `weight` [O,C,3,3].

    Taps that read the same pixel are adjacent, so each kernel is a sum over pairs of taps. In an odd phase the pairs
    start at the first tap; in an even phase the first tap is on its own. The result has the weight's memory format.
    """
    kernels = [
        F.avg_pool2d(weight, 2, padding=(1 - p, 1 - q), ceil_mode=True, divisor_override=1)
        for p in (0, 1)
        for q in (0, 1)
    ]
    return torch.cat(kernels).unflatten(0, (2, 2, len(weight)))  # cat keeps the memory format of 4-D tensors


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map [B,C,H,W] to [B,O,2H,2W] like `reference.upsample_conv`; `weight` [O,C,3,3], `bias` [O]."""
    kernels = phase_weights(weight).flatten(0, 2)  # [4 O, C, 2, 2]
    # Row i of the [H+1, W+1] result reads rows i-1 and i of x.
    phases = F.conv2d(x, kernels, None if bias is None else bias.repeat(4), padding=1)
    return InterleavePhases.apply(phases)


class InterleavePhases(torch.autograd.Function):
    """Interleave phases [B,4 O,H+1,W+1] into [B,O,2H,2W], in the same memory format.

    Output pixel (2i+p, 2j+q) is pixel (i+p, j+q) of phase (p, q).
    """

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        ctx.memory_format = memory_format_of(phases)
        out = new_output(phases)
        for phase, pixels in zip(phase_windows(phases), phase_pixels(out), strict=True):
            pixels.copy_(phase)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        batch, out, height, width = gradient.shape
        shape = batch, 4 * out, height // 2 + 1, width // 2 + 1
        phases = torch.zeros(shape, dtype=gradient.dtype, device=gradient.device).to(memory_format=ctx.memory_format)
        for phase, pixels in zip(phase_windows(phases), phase_pixels(gradient), strict=True):
            phase.copy_(pixels)
        return phases


def memory_format_of(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def new_output(phases: Tensor) -> Tensor:
    batch, channels, height, width = phases.shape
    shape = batch, channels // 4, 2 * (height - 1), 2 * (width - 1)
    return torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=memory_format_of(phases))


def phase_windows(phases: Tensor) -> list[Tensor]:
    """Return the [B,O,H,W] window of each phase that the output uses, ordered by row parity, then column parity."""
    out, height, width = phases.shape[1] // 4, phases.shape[2] - 1, phases.shape[3] - 1
    split = phases.split(out, dim=1)
    return [split[2 * p + q][:, :, p : p + height, q : q + width] for p in (0, 1) for q in (0, 1)]


def phase_pixels(out: Tensor) -> list[Tensor]:
    """Return a view of the output pixels of each phase."""
    return [out[:, :, p::2, q::2] for p in (0, 1) for q in (0, 1)]
