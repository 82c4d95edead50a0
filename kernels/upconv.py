"""Nearest x2 upsampling followed by a 3x3 convolution, as four 2x2 convolutions of the small map.

Upsampling repeats each pixel, so the nine taps of an output pixel read only four different pixels of the small map, and
which four depends on whether its row and column are even or odd. In one dimension, with taps w0, w1, w2:

    even output 2i   reads x[i-1], x[i]   with w0, w1 + w2
    odd output 2i+1  reads x[i], x[i+1]   with w0 + w1, w2

The upsampled map never exists, and of the 36 multiply-adds of four output pixels 16 are left. It is exact, also at the
border: the zeros around the upsampled map are those around the small one. The 3x3 weight stays the only parameter, so
state dicts do not change; it is folded in its own precision, so in float32 under autocast.

Two forms. The PyTorch form does all phases in one library convolution with 4 O channels (its [H+1, W+1] result is read
in four shifted windows) and interleaves the phases; four convolutions that read shifted windows of x were slower on a
CPU, since the library copies each window. The Triton form, for evaluation, is that of upconv_kernel.py.

In evaluation both fold BN into weight and bias (it follows the convolution directly), once for each state of the
parameters.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.kernels.targets import device_refusal

Form = Literal["torch", "triton"]


def phase_weights(weight: Tensor) -> Tensor:
    """The 2x2 kernels [2,2,O,C,2,2] (row parity, column parity, ...) that replace `weight` [O,C,3,3], in its layout.

    Taps that read the same pixel are neighbours, so a sum over pairs joins them; the pairs of an odd phase begin at
    the first tap, in an even one that is alone.
    """
    kernels = [
        F.avg_pool2d(weight, 2, padding=(1 - p, 1 - q), ceil_mode=True, divisor_override=1)
        for p in (0, 1)
        for q in (0, 1)
    ]
    return torch.cat(kernels).unflatten(0, (2, 2, len(weight)))  # of 4-D tensors cat keeps the layout


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B,C,H,W] -> [B,O,2H,2W], equal to `reference.upsample_conv`; `weight` [O,C,3,3], `bias` [O]."""
    kernels = phase_weights(weight).flatten(0, 2)  # [4 O, C, 2, 2]
    # Row i of the [H+1, W+1] result has read rows i-1 and i of x.
    phases = F.conv2d(x, kernels, None if bias is None else bias.repeat(4), padding=1)
    return Interleave.apply(phases)


class Interleave(torch.autograd.Function):
    """Phases [B,4 O,H+1,W+1] -> [B,O,2H,2W] in the same layout: output (2i+p, 2j+q) is phase (p, q) at (i+p, j+q)."""

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        ctx.layout = _layout(phases)
        out = _output(phases)
        for phase, place in zip(_windows(phases), _places(out), strict=True):
            place.copy_(phase)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        batch, out, height, width = gradient.shape
        shape = batch, 4 * out, height // 2 + 1, width // 2 + 1
        phases = torch.zeros(shape, dtype=gradient.dtype, device=gradient.device).to(memory_format=ctx.layout)
        for phase, place in zip(_windows(phases), _places(gradient), strict=True):
            phase.copy_(place)
        return phases


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _output(phases: Tensor) -> Tensor:
    batch, channels, height, width = phases.shape
    shape = batch, channels // 4, 2 * (height - 1), 2 * (width - 1)
    return torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=_layout(phases))


def _windows(phases: Tensor) -> list[Tensor]:
    """Of each phase, row parity first, the [B,O,H,W] window that is read."""
    out, height, width = phases.shape[1] // 4, phases.shape[2] - 1, phases.shape[3] - 1
    split = phases.split(out, dim=1)
    return [split[2 * p + q][:, :, p : p + height, q : q + width] for p in (0, 1) for q in (0, 1)]


def _places(out: Tensor) -> list[Tensor]:
    """Where each phase stands in the output."""
    return [out[:, :, p::2, q::2] for p in (0, 1) for q in (0, 1)]


class FusedUpConv(nn.Module):
    """Upsampling, convolution, BN, ReLU of a module with `conv` and `norm`, which it shares: [B,C,H,W] -> [B,O,2H,2W].

    `form` "torch" trains and evaluates; "triton" evaluates, in the dtype of its input or of autocast.
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, form: Form = "torch") -> None:
        super().__init__()
        self.conv, self.norm, self.form = conv, norm, form
        self._folded: tuple[Any, tuple[Tensor, Tensor]] | None = None

    @classmethod
    def from_module(cls, module: nn.Module, form: Form = "torch") -> "FusedUpConv":
        fused = cls(module.conv, module.norm, form)  # type: ignore[arg-type]
        return fused.train(module.training)

    def train(self, mode: bool = True) -> "FusedUpConv":
        self._folded = None  # `weight.data` may be changed without a trace
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return F.relu(self.norm(upsample_conv(x, self.conv.weight, self.conv.bias)), inplace=True)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight, bias = self._weights(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.form == "triton":
                from mgcc_dist.kernels.upconv_kernel import upconv_evaluate  # here, as Triton may not be installed

                return upconv_evaluate(x, weight, bias)
            phases = F.conv2d(x, weight, bias, padding=1)
        if torch.compiler.is_compiling():  # it joins passes by itself, and takes no `out` that is not contiguous
            return Interleave.apply(phases.relu())
        out = _output(phases)
        for phase, place in zip(_windows(phases), _places(out), strict=True):
            torch.clamp_min(phase, 0, out=place)
        return out

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias with BN in them, by phases, as this form reads them."""
        norm = self.norm
        sources = (self.conv.weight, self.conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        if torch.compiler.is_compiling() or any(t is not None and t.is_inference() for t in sources):
            return self._fold(dtype)  # these have no version to tell whether they changed
        state = dtype, self.form, [(t.data_ptr(), t._version) for t in sources if t is not None]
        if self._folded is None or self._folded[0] != state:
            self._folded = state, self._fold(dtype)
        return self._folded[1]

    def _fold(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        norm: Any = self.norm  # with running statistics, and perhaps without weight and bias
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        bias = -norm.running_mean if self.conv.bias is None else self.conv.bias - norm.running_mean
        bias = bias * scale if norm.bias is None else bias * scale + norm.bias
        kernels = phase_weights(self.conv.weight * scale[:, None, None, None])
        if self.form == "triton":
            return kernels.permute(0, 1, 4, 5, 3, 2).to(dtype).contiguous(), bias.float()
        layout = torch.channels_last
        return kernels.flatten(0, 2).to(dtype).contiguous(memory_format=layout), bias.repeat(4).to(dtype)


def supported(module: nn.Module, x: Tensor) -> str | None:
    """Why the PyTorch form can't take the place of `module` (with `conv` and `norm`) for x; None if it can."""
    conv: Any = module.conv
    norm: Any = module.norm
    plain = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.padding_mode == "zeros"
    if not plain or conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.groups != 1:
        return "its convolution is not 3x3 with stride 1, zero padding 1 and one group"
    if getattr(norm, "running_mean", None) is None:
        return "its norm has no running statistics"
    if x.dim() != 4 or not x.is_floating_point():
        return f"its input is {x.dtype} with {x.dim()} dimensions"
    return None


def triton_supported(module: nn.Module, x: Tensor) -> str | None:
    """The same of the Triton form."""
    if reason := supported(module, x):
        return reason
    conv: Any = module.conv
    if module.training or torch.is_grad_enabled():
        return "the Triton form of the up-convolution is for evaluation without gradients"
    if reason := device_refusal(x.device):
        return reason
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {x.dtype}"
    if any(channels % 64 and channels not in (16, 32) for channels in (conv.in_channels, conv.out_channels)):
        return f"{conv.in_channels} and {conv.out_channels} channels are not multiples of 64, or 16 or 32"
    return None
