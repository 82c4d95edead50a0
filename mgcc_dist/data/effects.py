"""What machines, patients and archives do to an ultrasound image: speckle, gain, blur, shadows, JPEG.

Each effect maps images float [B,1,H,W] in [0,1] to images in [0,1], with parameters per image, float [B] on the images'
device. Effects draw no random numbers: training draws parameters and noise per step, `mgcc evaluate` per image. Lengths
are relative to the image's height, or to its width across it, so that they mean the same at every resolution. They read
no values from the device. Blur and JPEG are kornia's.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def speckle(images: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    """Multiply by 1 + `deviation` * noise, whose grain is about a pixel at a height of 256, as in coherent imaging.

    `noise` is standard normal, [B,1,H,W].
    """
    grains = _smooth(noise, deviation.new_full(deviation.shape, 1 / 256), 1 / 256, border="circular")
    grains = grains / grains.std(dim=(1, 2, 3), keepdim=True)
    return (images * (1 + _column(deviation) * grains)).clamp(0, 1)


def gain(images: Tensor, shift: Tensor) -> Tensor:
    """Add `shift`, because B-mode images show a logarithmic scale. Black pixels stay black."""
    return _add(images, _column(shift))


def time_gain(images: Tensor, shifts: Tensor) -> Tensor:
    """Add a shift that varies with depth: `shifts` [B,K] at K equidistant depths from the first to the last row."""
    curve = F.interpolate(shifts[:, None], images.shape[2], mode="linear", align_corners=True)  # [B,1,H]
    return _add(images, curve[..., None])


def gamma(images: Tensor, exponent: Tensor) -> Tensor:
    """Raise to the power `exponent`; under 1 brightens."""
    return images ** _column(exponent)


def blur(images: Tensor, deviation: Tensor, largest: float) -> Tensor:
    """Blur by a Gaussian of the standard deviation `deviation`, which is at most `largest`, relative to the height."""
    return _smooth(images, deviation, largest, border="replicate").clamp(0, 1)


def shadow(images: Tensor, depth: Tensor, column: Tensor, row: Tensor, width: Tensor) -> Tensor:
    """Darken a sector below (`row`, `column`) by up to `depth`, as behind a rib or a calcification.

    It starts `width` wide and widens by a tenth of the image's width from top to bottom; its edges are soft.
    """
    rows = torch.linspace(0, 1, images.shape[2], device=images.device)[:, None]  # [H,1]
    columns = torch.linspace(0, 1, images.shape[3], device=images.device)  # [W]
    distance = rows - _column(row)  # [B,1,H,1], below the top
    below = (distance / 0.1).clamp(0, 1)
    half_width = _column(width) / 2 + 0.05 * distance.clamp(0, 1)
    inside = ((half_width - (columns - _column(column)).abs()) / 0.05 + 0.5).clamp(0, 1)  # [B,1,H,W]
    return images * (1 - _column(depth) * below * inside)


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Compress and decompress as JPEG of the quality 1 to 100.

    `quality` is on the CPU: kornia checks its values, which would wait for another device.
    """
    from kornia.enhance import jpeg_codec_differentiable

    return jpeg_codec_differentiable(images.expand(-1, 3, -1, -1), quality)[:, :1].clamp(0, 1)


def _add(images: Tensor, shift: Tensor) -> Tensor:
    return torch.where(images > 0, images + shift, images).clamp(0, 1)


def _smooth(images: Tensor, deviation: Tensor, largest: float, border: str) -> Tensor:
    """Filter by a Gaussian of `deviation` [B], at most `largest`, relative to the height."""
    from kornia.filters import filter2d_separable, get_gaussian_kernel1d

    side = images.shape[2]
    size = 2 * math.ceil(3 * largest * side) + 1
    kernel = get_gaussian_kernel1d(size, deviation[:, None] * side)
    return filter2d_separable(images, kernel, kernel, border_type=border)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]
