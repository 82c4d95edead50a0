"""Augmentation `ultrasound`: views of a batch that another patient, hand, machine or archive could have made.

A weak view moves tissue: scale, shift, rotation and elastic deformation, the same for an image and its mask. A strong
view of it also changes how it looks: speckle, shadow, blur, time-gain curve, gain, gamma, JPEG (data/effects.py).
Because the tissue stays in place, a prediction on the weak view is a target on the strong one.

Images stay upright: skin at the top, shadows downwards. The loader mirrors half of them.

All runs on the batch's device and reads nothing from it. Randomness comes from torch's global generators, which the
training loop seeds as a function of (seed, step, batch).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mgcc_dist.data import effects

LARGEST_BLUR = 0.008  # standard deviation relative to the side: two pixels of 256
GRID = 6  # control points of an elastic deformation along each side
LARGEST = {"scale": math.log(1.25), "shift": 0.1, "rotation": math.radians(15), "elastic": 0.02}
"""of the logarithm of the scale; of shift and displacement relative to the side; in radians"""


@torch.no_grad()
def weak_view(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Deform images float [B,1,S,S] in [-1,1], and masks float [L,1,S,S] of the first L of them, in the same way.

    Each deformation is applied to half of the images. What comes from outside the image is black and has no lesion.
    """
    grid = _sampling_grid(images)
    count = len(masks)
    deformed = F.grid_sample(images + 1, grid, mode="bilinear", align_corners=False) - 1  # -1 is black
    lesion = F.grid_sample(masks, grid[:count], mode="bilinear", align_corners=False) > 0.5
    return deformed, lesion.float()


@torch.no_grad()
def strong_view(images: Tensor) -> Tensor:
    """Change how images float [B,1,S,S] in [-1,1] look; each effect is applied to some of them, in float32."""
    dtype, images = images.dtype, images.float()
    grey, count = ((images + 1) / 2).clamp(0, 1), len(images)
    new = images.new_zeros(count)
    grey = effects.speckle(grey, _sometimes(0.5, _between(new, 0.05, 0.25)), torch.randn_like(grey))
    grey = effects.shadow(
        grey,
        depth=_sometimes(0.2, _between(new, 0.3, 0.9)),
        column=_between(new, 0, 1),
        row=_between(new, 0.1, 0.6),
        width=_between(new, 0.05, 0.25),
    )
    grey = effects.blur(grey, _sometimes(0.3, _between(new, 0.002, LARGEST_BLUR)), LARGEST_BLUR)
    grey = effects.time_gain(grey, _sometimes(0.3, _between(images.new_zeros(count, 4), -0.1, 0.1)))
    grey = effects.gain(grey, _sometimes(0.5, _between(new, -0.1, 0.1)))
    grey = effects.gamma(grey, _sometimes(0.5, _between(new, -0.3, 0.3)).exp())
    compressed = effects.jpeg(grey, _between(torch.zeros(count), 10, 60))
    chosen = _sometimes(0.2, torch.ones_like(new))[:, None, None, None] > 0
    return (torch.where(chosen, compressed, grey) * 2 - 1).to(dtype)


def _sampling_grid(images: Tensor) -> Tensor:
    """Draw one deformation per image: where each pixel comes from, [B,S,S,2] as in `grid_sample`."""
    new = images.new_zeros(len(images))
    scale, shift_x, shift_y, angle, elastic = (
        _sometimes(0.5, _between(new, -LARGEST[name], LARGEST[name]))
        for name in ("scale", "shift", "shift", "rotation", "elastic")
    )
    cos, sin = angle.cos() / scale.exp(), angle.sin() / scale.exp()
    rows = (torch.stack((cos, -sin, 2 * shift_x), dim=1), torch.stack((sin, cos, 2 * shift_y), dim=1))
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    points = _between(images.new_zeros(len(images), 2, GRID, GRID), -1, 1)
    field = F.interpolate(points, images.shape[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return grid + 2 * elastic[:, None, None, None] * field


def _between(like: Tensor, low: float, high: float) -> Tensor:
    """Draw a tensor of the shape and device of `like`, uniformly from [low, high)."""
    return low + (high - low) * torch.rand_like(like)


def _sometimes(share: float, values: Tensor) -> Tensor:
    """Set the values [B,...] of random images to 0, so that about `share` of the images keep theirs."""
    chosen = torch.rand_like(values[:, :1] if values.ndim > 1 else values) < share
    return torch.where(chosen, values, 0)
