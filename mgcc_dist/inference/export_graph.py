"""A trained network with everything around it as one module, to export: uint8 images of any size in, masks out.

Resizing is two matrix products, with matrices that the graph computes from the size of the images. They weigh pixels as
Pillow and `F.interpolate(antialias=True)` do. So all formats compute the same, and no backend needs an antialiased
resize.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mgcc_dist.data.geometry import Fit
from mgcc_dist.inference.predictor import THRESHOLD
from mgcc_dist.inference.winograd import WinogradConv, has_enough_channels, use_winograd
from mgcc_dist.kernels.upconv.phases import phase_weights
from mgcc_dist.models.blocks import NORMED_CONVOLUTIONS, UpConv

LUMA = (19595, 38470, 7471)
"""Pillow's weights of red, green and blue, over 65536"""


class ExportGraph(nn.Module):
    """Images uint8 [B,H,W,3] (RGB; repeat grey ones) -> mask bool [B,H,W], probability float32 [B,H,W] in [0,1].

    Any B, H and W. The same as `Predictor.predict`, up to rounding.

    Args:
        network: images [B,1,S,S] in [-1,1] -> logits [B,1,S,S], in evaluation mode; its convolutions are replaced.
        image_size: S.
        fit: how images become the square.
        winograd: whether large 3x3 convolutions are those of `winograd.py`.
    """

    luma: Tensor
    square: Tensor

    def __init__(self, network: nn.Module, image_size: int, fit: Fit, winograd: bool = False) -> None:
        super().__init__()
        self.network = use_fast_convolutions(network, winograd)
        self.fit = fit
        self.register_buffer("luma", torch.tensor(LUMA, dtype=torch.float32), persistent=False)
        self.register_buffer("square", torch.arange(image_size), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # Sides as tensors, which every exporter and tracer keeps dynamic.
        rows = torch.ones_like(images[0, :, 0, 0], dtype=torch.int64).cumsum(0) - 1
        columns = torch.ones_like(images[0, 0, :, 0], dtype=torch.int64).cumsum(0) - 1
        height, width = rows.max() + 1, columns.max() + 1
        down, up = self._matrices(rows, height, width)
        across, back = self._matrices(columns, width, height)

        grey = (((images.float() * self.luma).sum(-1) + 32768) / 65536).floor().double()  # [B,H,W]
        if self.fit == "released":
            square = (down @ grey @ across.T).round()
        else:  # exact, ties too: Pillow's weights are multiples of 2^-22, and it keeps 8 bits between its two passes
            down, across = (((weights * 2**22) + 0.5).floor() / 2**22 for weights in (down, across))
            wide = (grey @ across.T + 0.5).floor()
            square = (down @ wide + 0.5).floor()
        images = square.float()[:, None] / 127.5 - 1  # [B,1,S,S]
        probability = up.float() @ self.network(images).sigmoid()[:, 0] @ back.float().T
        return probability > THRESHOLD, probability

    def _matrices(self, pixels: Tensor, side: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Return what resizes one axis of an image to the square, [S,side], and back, [side,S]; see `boxes`."""
        size = self.square.shape[0]
        seen = shown = torch.zeros_like(side)  # where the boxes begin
        if self.fit == "crop":
            seen = torch.minimum((side - torch.minimum(side, other) + 1) // 2, (side - 1) // 2)
        elif self.fit == "letterbox":
            longest = torch.maximum(side, other)
            shown = ((size * (longest - side) + longest) // (2 * longest)).clamp(max=(size - 1) // 2)
        image_box, square_box = (seen, side - seen), (shown, size - shown)
        antialias = self.fit != "released"
        return (
            resize_matrix(pixels, self.square, image_box, square_box, antialias),
            resize_matrix(self.square, pixels, square_box, image_box, antialias=True),
        )


def resize_matrix(
    source: Tensor,
    target: Tensor,
    source_box: tuple[Tensor, Tensor],
    target_box: tuple[Tensor, Tensor],
    antialias: bool,
) -> Tensor:
    """Return the weights float64 [target pixels,source pixels] that resize one axis bilinearly, box to box.

    Args:
        source, target: indices of all pixels, int64.
        source_box, target_box: first pixel of each box, and the one after its last. Weights outside are 0.
    """
    scale = (source_box[1] - source_box[0]).double() / (target_box[1] - target_box[0])
    centers = source_box[0] + ((target - target_box[0]).double() + 0.5) * scale
    support = scale.clamp(min=1) if antialias else 1
    weights = (1 - (source.double() + 0.5 - centers[:, None]).abs() / support).clamp(min=0)
    weights = weights * ((source >= source_box[0]) & (source < source_box[1]))
    weights = weights * ((target >= target_box[0]) & (target < target_box[1]))[:, None]
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-9)


class PhaseUpConv(nn.Module):
    """An up-convolution in evaluation as one 2x2 convolution: [B,C,H,W] -> [B,O,2H,2W].

    It needs 4/9 of the operations of upsampling and a 3x3 convolution. `mgcc_dist.kernels.upconv` has the same for
    PyTorch, with writes to strides that exporters do not translate well.

    Args:
        conv: 3x3, with BN folded in.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        self.weight = nn.Parameter(phase_weights(conv.weight).flatten(0, 2))  # [4 O,C,2,2]
        self.bias = nn.Parameter(conv.bias.repeat(4))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        phases = F.conv2d(x, self.weight, self.bias, padding=1).relu().chunk(4, 1)
        windows = [phases[2 * p + q][:, :, p : p + height, q : q + width] for p in (0, 1) for q in (0, 1)]
        return F.pixel_shuffle(torch.stack(windows, 2).flatten(1, 2), 2)


def use_fast_convolutions(network: nn.Module, winograd: bool) -> nn.Module:
    """Replace the up-convolutions of a network in evaluation mode by their phase form. Modifies and returns it.

    With `winograd`, up-convolutions and 3x3 convolutions of many channels get Winograd's form instead.
    """
    for name, child in list(network.named_children()):
        if isinstance(child, UpConv):
            norm: Any = child.norm
            folded = fuse_conv_bn_eval(child.conv, norm)
            conv: nn.Module = PhaseUpConv(folded)
            if winograd and has_enough_channels(folded):
                conv = nn.Sequential(WinogradConv(folded, conv, upsample=True), nn.ReLU())
            setattr(network, name, conv)
        elif winograd and type(child) in NORMED_CONVOLUTIONS:
            use_winograd(child)
        else:
            use_fast_convolutions(child, winograd)
    return network
