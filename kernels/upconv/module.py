"""The drop-in module of the up-convolution."""

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bias_free import bias_is_needed, norm_without_bias
from ..fused_module import FusedModule
from .phases import InterleavePhases, new_output, phase_pixels, phase_weights, phase_windows, upsample_conv


def norm_of_upsample_conv(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """Return norm(conv(upsampled x)), and update running statistics."""
    if bias_is_needed(x, conv, norm):
        return norm(upsample_conv(x, conv.weight, conv.bias))
    return norm_without_bias(upsample_conv(x, conv.weight), conv.bias, norm)


class FusedUpConv(FusedModule):
    """Upsampling, convolution, BatchNorm and ReLU: [B,C,H,W] -> [B,O,2H,2W], with the plain module's `conv` and `norm`.

    "torch" supports training and evaluation. "triton" is used in evaluation only, in the dtype of its input or of
    autocast.
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    implementation: Literal["torch", "triton"]

    def __init__(self, channels: int, out: int, implementation: Literal["torch", "triton"] = "torch") -> None:
        super().__init__(channels, out, implementation=implementation)

    @staticmethod
    def make_parts(*sizes: int) -> dict[str, nn.Module]:
        channels, out = sizes
        return {"conv": nn.Conv2d(channels, out, 3, padding=1), "norm": nn.BatchNorm2d(out)}

    def _adopt(self, parts: Mapping[str, nn.Module], implementation: Any) -> None:
        super()._adopt(parts, implementation or "torch")
        self._cached: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def train(self, mode: bool = True) -> Self:
        self._cached = None  # writes through `weight.data` do not change the version
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return F.relu(norm_of_upsample_conv(x, self.conv, self.norm), inplace=True)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight, bias = self._evaluation_weights(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.implementation == "triton":
                from .op import upconv_evaluate  # Triton is optional

                return upconv_evaluate(x, weight, bias)
            phases = F.conv2d(x, weight, bias, padding=1)
        if torch.compiler.is_compiling():  # Inductor fuses this, and rejects a non-contiguous `out`
            return InterleavePhases.apply(phases.relu())
        out = new_output(phases)
        for phase, pixels in zip(phase_windows(phases), phase_pixels(out), strict=True):
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
