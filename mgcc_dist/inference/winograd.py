"""Winograd's minimal filtering F(4x4,3x3) for exported networks: 3x3 convolutions with a quarter of the operations.

The output is cut into tiles of 4x4 pixels. A tile d of 6x6 input pixels and a kernel g give the output tile

    A^T [(G g G^T) * (B^T d B)] A

where * is elementwise: 36 multiplications instead of 144. Summed over input channels it is a matrix product for each of
the 36 elements ("frequencies"), which backends compute at full speed. B^T d B is a convolution with stride 4, with the
channels as its batch. G g G^T depends on weights only: backends compute it once, when they load the model, so that the
file keeps the 3x3 kernels.

In a tile of a twofold nearest upsampling, rows and columns repeat, and one row and one column of B^T d B are zero. So
an up-convolution takes 25 products per tile of 4x4 outputs, where upsampling and a 3x3 convolution take 144, and the
phase form 64. A convolution with dilation 2 is four convolutions, of the pixels of even and odd rows and columns.

Source: Lavin and Gray 2016, "Fast algorithms for convolutional neural networks".
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mgcc_dist.models.blocks import NORMED_CONVOLUTIONS

CHANNELS = 128
"""channels from which it is faster than a direct convolution: with fewer, the transforms outweigh the products"""
TILE = 4
INPUT = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
"""B^T"""
KERNEL = (
    torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64) / 24
)
"""G"""
OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], dtype=torch.float64
)
"""A^T"""
UPSAMPLE = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).double()
"""a row of an upsampled tile, from four pixels"""
UPSAMPLED = [0, 1, 3, 4, 5]
"""frequencies of an upsampled tile that are not zero"""


class WinogradConv(nn.Module):
    """A 3x3 convolution with BN folded in, in evaluation: [B,C,H,W] -> [B,O,H,W], or [B,O,2H,2W] if `upsample`.

    Where the sides of the output are not multiples of 4 * dilation, `plain` computes it.

    Args:
        conv: has padding equal to its dilation.
        plain: the same in another way.
        upsample: whether the input is upsampled twofold (nearest) before the convolution.
    """

    tiles: Tensor
    kernel: Tensor
    output: Tensor

    def __init__(self, conv: nn.Conv2d, plain: nn.Module, upsample: bool = False) -> None:
        super().__init__()
        assert conv.bias is not None
        self.weight, self.bias, self.plain = conv.weight, conv.bias, plain
        self.dilation = conv.dilation[0]
        self.scale = 2 if upsample else 1
        kept = UPSAMPLED if upsample else list(range(6))
        rows = (INPUT @ UPSAMPLE if upsample else INPUT)[kept]
        tiles = torch.kron(rows, rows).unflatten(1, (1, rows.shape[1], rows.shape[1]))
        self.register_buffer("tiles", tiles.float(), persistent=False)  # [F,1,6,6]
        self.register_buffer("kernel", torch.kron(KERNEL[kept], KERNEL[kept]).float(), persistent=False)  # [F,9]
        output = torch.kron(OUTPUT[:, kept], OUTPUT[:, kept])
        self.register_buffer("output", output.float(), persistent=False)  # [16,F]

    def forward(self, x: Tensor) -> Tensor:
        (channels, height, width), d = x.shape[1:], self.dilation
        if any(side * self.scale % (TILE * d) for side in (height, width)):
            return self.plain(x)
        out, frequencies = len(self.weight), len(self.tiles)
        kernels = (self.kernel @ self.weight.permute(2, 3, 0, 1).flatten(2).flatten(0, 1)).unflatten(1, (out, channels))

        phases = x.reshape(-1, height // d, d, width // d, d).permute(0, 2, 4, 1, 3) if d > 1 else x
        phases = phases.reshape(-1, 1, height // d, width // d)  # [B C d d,1,H/d,W/d]
        tiles = F.conv2d(phases, self.tiles, stride=TILE // self.scale, padding=1)  # [B C d d,F,h,w]
        h, w = tiles.shape[2:]
        tiles = tiles.reshape(-1, channels, d * d, frequencies, h * w).permute(3, 1, 0, 2, 4)
        products = kernels @ tiles.reshape(frequencies, channels, -1)  # [F,O,B d d h w]
        pixels = self.output @ products.reshape(frequencies, -1)  # [16,O B d d h w]
        pixels = pixels.reshape(TILE, TILE, out, -1, d, d, h, w).permute(3, 2, 6, 0, 4, 7, 1, 5)
        return pixels.reshape(-1, out, height * self.scale, width * self.scale) + self.bias[:, None, None]


def use_winograd(block: nn.Module) -> None:
    """Replace the 3x3 convolutions of a DoubleConv or MSAG in evaluation mode, and fold their BN into them."""
    for conv_name, norm_name in NORMED_CONVOLUTIONS[type(block)]:
        conv: Any = getattr(block, conv_name)
        if conv.kernel_size == (3, 3) and has_enough_channels(conv):
            folded = fuse_conv_bn_eval(conv, getattr(block, norm_name))
            setattr(block, conv_name, WinogradConv(folded, folded))
            setattr(block, norm_name, nn.Identity())


def has_enough_channels(conv: nn.Conv2d) -> bool:
    return min(conv.in_channels, conv.out_channels) >= CHANNELS
