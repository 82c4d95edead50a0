"""Boxes of pixels that methods paste from one image into another."""

import torch
from torch import Tensor


def box_masks(images: Tensor, height: Tensor, width: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Return the pixels inside one box per image: bool [B,1,H,W] for [B,C,H,W].

    `height` and `width` [B,1,1] are relative to the image. `top` and `left` [B,1,1] go from 0, where the box touches
    the upper or left edge, to 1, where it touches the other one.
    """
    rows = (torch.arange(images.shape[2], device=images.device)[:, None] + 0.5) / images.shape[2]
    columns = (torch.arange(images.shape[3], device=images.device)[None, :] + 0.5) / images.shape[3]
    inside_rows = (rows >= top * (1 - height)) & (rows < top * (1 - height) + height)
    inside_columns = (columns >= left * (1 - width)) & (columns < left * (1 - width) + width)
    return (inside_rows & inside_columns)[:, None]


def cut_mix(boxes: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Paste the boxes of the previous image of the batch into each image of each tensor [B,C,H,W]."""
    return [torch.where(boxes, tensor.roll(1, 0), tensor) for tensor in tensors]
