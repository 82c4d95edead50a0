"""Batches of labeled and unlabeled images: as loaded, in bytes, and on the device, in floating point."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mgcc_dist.data.ultrasound import strong_view, weak_view


@dataclass
class Batch:
    """L labeled images (real ones, then synthetic ones) followed by U unlabeled ones.

    images: float32 [L+U,1,S,S] in [-1,1]. masks: float32 [L,1,S,S] of 0 and 1. offsets: int64 [L+U] on the CPU, each
    sample's offset in its stream (in evaluation: its dataset index), unique over ranks. keys: the samples' keys.
    own_masks: bool [H,W] of each labeled sample at its own size, only in evaluation under a fit that keeps proportions.
    weak: [L+U,1,S,S], the weak view that `images` are a strong view of (data/ultrasound.py); None if `images` are weak.
    """

    images: Tensor
    masks: Tensor
    offsets: Tensor
    keys: list[str]
    own_masks: list[Tensor] = field(default_factory=list)
    weak: Tensor | None = None

    @property
    def labeled(self) -> int:
        return self.masks.shape[0]

    @property
    def weak_images(self) -> Tensor:
        """The images before effects on their appearance: what a method takes its targets from."""
        return self.images if self.weak is None else self.weak

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """Move images and masks to `device`; offsets stay on the CPU, where random generators are seeded with them."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            masks=self.masks.to(device, non_blocking=non_blocking),
            own_masks=[mask.to(device, non_blocking=non_blocking) for mask in self.own_masks],
            weak=None if self.weak is None else self.weak.to(device, non_blocking=non_blocking),
        )


@dataclass
class ByteBatch:
    """A Batch as loaded, before conversion to floating point: a quarter of the bytes to transfer to the device.

    images: uint8 [L+U,1,S,S]. masks: bool [L,1,S,S]. offsets, keys, own_masks: as in Batch. ultrasound: whether the
    augmentation `ultrasound` is applied on the device.
    """

    images: Tensor
    masks: Tensor
    offsets: Tensor
    keys: list[str]
    own_masks: list[Tensor] = field(default_factory=list)
    ultrasound: bool = False

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Move to `device`, convert to floating point and augment there; offsets stay on the CPU."""
        images = normalize(self.images.to(device, non_blocking=non_blocking))
        masks = self.masks.to(device, non_blocking=non_blocking).float()
        own_masks = [mask.to(device, non_blocking=non_blocking) for mask in self.own_masks]
        if not self.ultrasound:
            return Batch(images, masks, self.offsets, self.keys, own_masks)
        weak, masks = weak_view(images, masks)
        return Batch(strong_view(weak), masks, self.offsets, self.keys, own_masks, weak)

    def pin_memory(self) -> "ByteBatch":
        return replace(self, images=self.images.pin_memory(), masks=self.masks.pin_memory())


def normalize(pixels: Tensor) -> Tensor:
    """Convert grey values from uint8 to float32 in [-1,1], the input range of every network of the package."""
    return pixels.float().div_(127.5).sub_(1)
