"""U-Net (Ronneberger et al. 2015) as the paper's baseline: 34.53 M parameters at the default widths."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.models.blocks import MSAG, DoubleConv, UpConv, fit_input
from mgcc_dist.models.config import InputRange
from mgcc_dist.models.network import EncoderDecoder
from mgcc_dist.models.pretrained import IMAGENET, PretrainedEncoder, pretrained_encoder

PAPER_WIDTHS = (64, 128, 256, 512, 1024)


class Encoder(nn.Module):
    """Images [B,in_channels or 1,H,W] -> features [B,widths[i],H/2^i,W/2^i] of every level, shallow to deep.

    One-channel images are repeated to `in_channels`. H and W must be multiples of 2^(levels - 1). Images are in [-1,1];
    `input_range` is what the first convolution sees.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], input_range: InputRange = "unit") -> None:
        super().__init__()
        self.in_channels = in_channels
        self.input_range = input_range
        self.blocks = nn.ModuleList(DoubleConv(before, width) for before, width in pairwise((in_channels, *widths)))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = fit_input(x, 2 ** (len(self.blocks) - 1), self.in_channels)
        if self.input_range == "released":
            x = released_range(x)
        features = []
        for level, block in enumerate(self.blocks):
            x = block(F.max_pool2d(x, 2) if level else x)
            features.append(x)
        return features


def released_range(images: Tensor) -> Tensor:
    """Convert images from [-1,1] to the released code's range: ImageNet's mean and deviation, then divided by 255.

    With three channels each has its own constants, as in Albumentations' Normalize; else all have their averages.
    """
    mean, deviation = (images.new_tensor(IMAGENET[name]) for name in ("mean", "std"))
    if images.shape[1] != len(mean):
        mean, deviation = mean.mean(), deviation.mean()
    return ((images + 1) / 2 - mean.view(-1, 1, 1)) / (255 * deviation.view(-1, 1, 1))


def build_encoder(
    in_channels: int,
    widths: Sequence[int],
    input_range: InputRange,
    encoder: str | None = None,
    encoder_config: str | None = None,
) -> Encoder | PretrainedEncoder:
    """Build the encoder of a network's config: the U-Net's, or a pretrained one."""
    if encoder or encoder_config:
        return pretrained_encoder(in_channels, widths, encoder, encoder_config)
    return Encoder(in_channels, widths, input_range)


class Decoder(nn.Module):
    """Features of every level, shallow to deep -> logits [B,1,H,W]. With `gated`, each skip passes an MSAG."""

    def __init__(self, widths: Sequence[int], gated: bool) -> None:
        super().__init__()
        levels = list(pairwise(widths))
        self.ups = nn.ModuleList(UpConv(deeper, width) for width, deeper in levels)
        self.gates = nn.ModuleList(MSAG(width) if gated else nn.Identity() for width, _ in levels)
        self.blocks = nn.ModuleList(DoubleConv(2 * width, width) for width, _ in levels)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        *skips, x = features
        for skip, up, gate, block in reversed(list(zip(skips, self.ups, self.gates, self.blocks, strict=True))):
            x = block(torch.cat((gate(skip), up(x)), dim=1))
        return self.head(x)


class UNet(EncoderDecoder):
    """Encoder and decoder with plain skips: images [B,in_channels or 1,H,W] -> logits [B,1,H,W]."""

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = PAPER_WIDTHS,
        input_range: InputRange = "unit",
        encoder: str | None = None,
        encoder_config: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder = build_encoder(in_channels, widths, input_range, encoder, encoder_config)
        self.decoder = Decoder(widths, gated=False)

    def encode(self, x: Tensor) -> list[Tensor]:
        return self.encoder(x)

    def decode(self, features: list[Tensor]) -> Tensor:
        return self.decoder(features)
