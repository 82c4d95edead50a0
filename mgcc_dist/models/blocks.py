"""Building blocks of the networks: convolution blocks, ConvMixer layer, multi-scale attention gate, perturbations.

Tensors are [B,C,H,W]. Convolutions and norms are named attributes, so that a fused module can replace them with
the same state_dict keys. `fusible` names the operation of `mgcc_dist.kernels` that does so.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.common.errors import UserError
from mgcc_dist.kernels.bias_free import norm_of_convolution
from mgcc_dist.kernels.operation import fusible


def fit_input(x: Tensor, multiple: int, channels: int, rule: str = "It must be") -> Tensor:
    """Return images [B,1 or channels,H,W] with `channels` channels; a grey one is repeated, without a copy.

    Raises:
        UserError: H or W is not a multiple of `multiple`; `rule` says why it must be.
    """
    height, width = x.shape[2:]
    if height % multiple or width % multiple:
        raise UserError(f"image_size: {width}x{height} does not fit the network. {rule} a multiple of {multiple}.")
    return x.expand(-1, channels, -1, -1) if x.shape[1] == 1 else x


class DoubleConv(nn.Module):
    """(3x3 convolution, BN, ReLU) twice: [B,in,H,W] -> [B,out,H,W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(norm_of_convolution(x, self.conv1, self.norm1), inplace=True)
        return F.relu(norm_of_convolution(x, self.conv2, self.norm2), inplace=True)


@fusible("upconv")
class UpConv(nn.Module):
    """Nearest x2 upsampling, 3x3 convolution, BN, ReLU: [B,in,H,W] -> [B,out,2H,2W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.relu(norm_of_convolution(x, self.conv, self.norm), inplace=True)


@fusible("convmixer")
class ConvMixerLayer(nn.Module):
    """One ConvMixer layer (Eq. 3 and 4): depthwise convolution with a residual, then pointwise convolution.

    Each convolution is followed by GELU and then BN. Keeps the shape [B,C,H,W].
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.depthwise_norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.pointwise_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.depthwise_norm(F.gelu(self.depthwise(x)))  # Eq. 3
        return self.pointwise_norm(F.gelu(self.pointwise(x)))  # Eq. 4


@fusible("mixer")
class ConvMixer(nn.Sequential):
    """A stack of equal ConvMixer layers. Keeps the shape [B,C,H,W]."""

    def __init__(self, channels: int, kernel_size: int, layers: int) -> None:
        super().__init__(*(ConvMixerLayer(channels, kernel_size) for _ in range(layers)))

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Return the output of every layer."""
        outputs = [x]
        for layer in self:
            outputs.append(layer(outputs[-1]))
        return outputs[1:]


class FusedCatReLU(torch.autograd.Function):
    """Concatenate maps [B,C_i,H,W] along channels, then ReLU: [B,sum C_i,H,W].

    Equals `relu(cat(maps))`, but backward returns a dense gradient for each map. The backward of `cat` returns slices
    of one gradient, which the channels-last backward of BatchNorm reads element by element.
    """

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        out = torch.cat(maps, dim=1).relu_()
        ctx.save_for_backward(out)
        ctx.channels = [each.shape[1] for each in maps]
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        (out,) = ctx.saved_tensors
        pairs = zip(grad_output.split(ctx.channels, 1), out.split(ctx.channels, 1), strict=True)
        return tuple(torch.ops.aten.threshold_backward(grad, y, 0) for grad, y in pairs)


@fusible("msag")
class MSAG(nn.Module):
    """Multi-scale attention gate on a skip connection (Eq. 5 and 6). Keeps the shape [B,C,H,W].

    Eq. 6 shows no BN after the vote convolution; with it the parameter counts are those of Table VII.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.pointwise_norm = nn.BatchNorm2d(channels)
        self.ordinary = nn.Conv2d(channels, channels, 3, padding=1)
        self.ordinary_norm = nn.BatchNorm2d(channels)
        self.dilated = nn.Conv2d(channels, channels, 3, padding=2, dilation=2)
        self.dilated_norm = nn.BatchNorm2d(channels)
        self.vote = nn.Conv2d(3 * channels, channels, 1)
        self.vote_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        scales = (
            norm_of_convolution(x, self.pointwise, self.pointwise_norm),
            norm_of_convolution(x, self.ordinary, self.ordinary_norm),
            norm_of_convolution(x, self.dilated, self.dilated_norm),
        )
        # TorchScript, traced without gradients, has no autograd functions. Eq. 5
        multi_scale = FusedCatReLU.apply(*scales) if torch.is_grad_enabled() else torch.cat(scales, dim=1).relu_()
        return x + x * norm_of_convolution(multi_scale, self.vote, self.vote_norm).sigmoid()  # Eq. 6


NORMED_CONVOLUTIONS: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {
    DoubleConv: (("conv1", "norm1"), ("conv2", "norm2")),
    UpConv: (("conv", "norm"),),
    MSAG: tuple((name, f"{name}_norm") for name in ("pointwise", "ordinary", "dilated", "vote")),
}
"""the convolutions of each block that BN directly follows, and that BN"""


def _drawn(draw: Callable[[Sequence[int]], Tensor], shape: Sequence[int], x: Tensor) -> Tensor:
    """Return random values of `shape` [..,C,H,W] that do not depend on the memory layout of x, for use with x.

    On a GPU they are drawn in the order of the channels-last layout and stored in the layout of x, so that the kernels
    that combine them with x read both in order. On a CPU they are drawn and stored in the contiguous layout.
    """
    if x.device.type == "cpu":
        return draw(shape)
    *batch, channels, height, width = shape
    values = draw((*batch, height, width, channels)).movedim(-1, -3)
    return values if x.is_contiguous(memory_format=torch.channels_last) else values.contiguous()


def feature_noise(x: Tensor) -> Tensor:
    """F-Noise (Ouali et al. 2020): x * (1 + u), u ~ U(-0.3, 0.3) of shape [C,H,W], the same for the whole batch."""
    noise = 0.6 * _drawn(partial(torch.rand, dtype=x.dtype, device=x.device), x.shape[1:], x) - 0.3
    return x * (1 + noise)


def feature_dropout(x: Tensor) -> Tensor:
    """F-Drop (Ouali et al. 2020): zero the most active pixels of each image, in all channels.

    A pixel is kept where its channel mean is below the image's maximum channel mean times a factor ~ U(0.7, 0.9), drawn
    once per call.
    """
    attention = x.mean(dim=1, keepdim=True)
    factor = 0.7 + 0.2 * torch.rand((), device=x.device)
    threshold = attention.amax(dim=(2, 3), keepdim=True) * factor
    return x * (attention < threshold)


def dropout(x: Tensor) -> Tensor:
    """Elementwise dropout with p = 0.3; kept elements are scaled by 1 / 0.7."""
    kept = _drawn(lambda shape: x.new_empty(shape).bernoulli_(0.7), x.shape, x)
    return x * kept / 0.7


def perturbed(features: Sequence[Tensor], perturb: Callable[[Tensor], Tensor], perturb_skips: bool) -> list[Tensor]:
    """Apply `perturb` to the bottleneck features and, if `perturb_skips`, to those of every level (shallow to deep)."""
    *skips, bottleneck = features
    return [*(map(perturb, skips) if perturb_skips else skips), perturb(bottleneck)]
