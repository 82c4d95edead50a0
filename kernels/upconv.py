"""Nearest x2 upsampling followed by a 3x3 convolution, computed as four 2x2 convolutions on the low-resolution map.

Upsampling repeats each pixel, so the nine taps of an output pixel read only four different input pixels. Which four
depends on the parity of its row and column (its phase). In one dimension, with taps w0, w1, w2:

    even output 2i   reads x[i-1], x[i]   with w0, w1 + w2
    odd output 2i+1  reads x[i], x[i+1]   with w0 + w1, w2

The upsampled map is never stored, and 16 of 36 multiply-adds per four output pixels remain. The result is exact, also
at the border: zero padding of the upsampled map is zero padding of the input. The 3x3 weight stays the only parameter,
so state dicts do not change. It is folded in its own precision, that is in float32 under autocast.

The PyTorch implementation computes all phases in one convolution with 4 O channels, reads its [H+1, W+1] result in four
shifted windows and interleaves them. Four convolutions on shifted windows of x were slower on a CPU, because the
library copies each window. The Triton implementation (upconv_kernel.py) is for evaluation only.

In evaluation both fold BatchNorm into weight and bias, because it directly follows the convolution. The folded weights
are cached until a parameter changes.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.kernels.targets import unsupported_device_reason

Implementation = Literal["torch", "triton"]


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
        ctx.memory_format = _memory_format(phases)
        out = _new_output(phases)
        for phase, pixels in zip(_phase_windows(phases), _phase_pixels(out), strict=True):
            pixels.copy_(phase)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        batch, out, height, width = gradient.shape
        shape = batch, 4 * out, height // 2 + 1, width // 2 + 1
        phases = torch.zeros(shape, dtype=gradient.dtype, device=gradient.device).to(memory_format=ctx.memory_format)
        for phase, pixels in zip(_phase_windows(phases), _phase_pixels(gradient), strict=True):
            phase.copy_(pixels)
        return phases


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _new_output(phases: Tensor) -> Tensor:
    batch, channels, height, width = phases.shape
    shape = batch, channels // 4, 2 * (height - 1), 2 * (width - 1)
    return torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=_memory_format(phases))


def _phase_windows(phases: Tensor) -> list[Tensor]:
    """Return the [B,O,H,W] window of each phase that the output uses, ordered by row parity, then column parity."""
    out, height, width = phases.shape[1] // 4, phases.shape[2] - 1, phases.shape[3] - 1
    split = phases.split(out, dim=1)
    return [split[2 * p + q][:, :, p : p + height, q : q + width] for p in (0, 1) for q in (0, 1)]


def _phase_pixels(out: Tensor) -> list[Tensor]:
    """Return a view of the output pixels of each phase."""
    return [out[:, :, p::2, q::2] for p in (0, 1) for q in (0, 1)]


class FusedUpConv(nn.Module):
    """Upsampling, convolution, BatchNorm and ReLU: [B,C,H,W] -> [B,O,2H,2W], with the plain module's `conv` and `norm`.

    "torch" supports training and evaluation. "triton" is used in evaluation only, in the dtype of its input or of
    autocast.
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, implementation: Implementation = "torch") -> None:
        super().__init__()
        self.conv, self.norm, self.implementation = conv, norm, implementation
        self._cached: tuple[Any, tuple[Tensor, Tensor]] | None = None

    @classmethod
    def from_module(cls, module: nn.Module, implementation: Implementation = "torch") -> "FusedUpConv":
        fused = cls(module.conv, module.norm, implementation)  # type: ignore[arg-type]
        return fused.train(module.training)

    def train(self, mode: bool = True) -> "FusedUpConv":
        self._cached = None  # writes through `weight.data` do not change the version
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return F.relu(self.norm(upsample_conv(x, self.conv.weight, self.conv.bias)), inplace=True)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight, bias = self._evaluation_weights(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.implementation == "triton":
                from mgcc_dist.kernels.upconv_kernel import upconv_evaluate  # Triton is optional

                return upconv_evaluate(x, weight, bias)
            phases = F.conv2d(x, weight, bias, padding=1)
        if torch.compiler.is_compiling():  # Inductor fuses this, and rejects a non-contiguous `out`
            return InterleavePhases.apply(phases.relu())
        out = _new_output(phases)
        for phase, pixels in zip(_phase_windows(phases), _phase_pixels(out), strict=True):
            torch.clamp_min(phase, 0, out=pixels)
        return out

    def _evaluation_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the phase weights and bias with BatchNorm folded in, cached until a parameter or buffer changes."""
        norm = self.norm
        sources = (self.conv.weight, self.conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        if torch.compiler.is_compiling() or any(t is not None and t.is_inference() for t in sources):
            return self._fold_norm(dtype)  # inference tensors have no version counter
        state = dtype, self.implementation, [(t.data_ptr(), t._version) for t in sources if t is not None]
        if self._cached is None or self._cached[0] != state:
            self._cached = state, self._fold_norm(dtype)
        return self._cached[1]

    def _fold_norm(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        norm: Any = self.norm  # has running statistics, but weight and bias may be None
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        bias = -norm.running_mean if self.conv.bias is None else self.conv.bias - norm.running_mean
        bias = bias * scale if norm.bias is None else bias * scale + norm.bias
        kernels = phase_weights(self.conv.weight * scale[:, None, None, None])
        if self.implementation == "triton":
            return kernels.permute(0, 1, 4, 5, 3, 2).to(dtype).contiguous(), bias.float()
        layout = torch.channels_last
        return kernels.flatten(0, 2).to(dtype).contiguous(memory_format=layout), bias.repeat(4).to(dtype)


def unsupported_reason(module: nn.Module, x: Tensor) -> str | None:
    """Return why the PyTorch implementation cannot replace `module` for x, or None if it can."""
    conv: Any = module.conv
    norm: Any = module.norm
    plain = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.padding_mode == "zeros"
    if not plain or conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.groups != 1:
        return "the convolution is not 3x3 with stride 1, zero padding 1 and one group"
    if getattr(norm, "running_mean", None) is None:
        return "the norm has no running statistics"
    if x.dim() != 4 or not x.is_floating_point():
        return f"the input is {x.dtype} with {x.dim()} dimensions, not a 4-D float tensor"
    return None


def triton_unsupported_reason(module: nn.Module, x: Tensor) -> str | None:
    """Return why the Triton implementation cannot replace `module` for x, or None if it can."""
    if reason := unsupported_reason(module, x):
        return reason
    conv: Any = module.conv
    if module.training or torch.is_grad_enabled():
        return "the Triton up-convolution supports only evaluation without gradients"
    if reason := unsupported_device_reason(x.device):
        return reason
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the dtype is {x.dtype}, but the kernel supports float32, float16 and bfloat16"
    if any(channels % 64 and channels not in (16, 32) for channels in (conv.in_channels, conv.out_channels)):
        return f"the channels are {conv.in_channels} -> {conv.out_channels}, but must be 16, 32 or multiples of 64"
    return None
