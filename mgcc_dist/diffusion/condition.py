"""What a denoiser knows about an image besides its noisy latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Condition:
    """Class and lesion mask of a batch; a denoiser without classes or without masks gets None in their place."""

    labels: Tensor | None = None
    """int64 [B]; the last label is the null class, which stands for any class"""
    mask: Tensor | None = None
    """float [B,1,h,w], at latent size: -1 is background, 1 is lesion; 0 in all pixels stands for any mask. Values in
    between are the share of lesion in what a latent pixel covers (`shrink_masks`)"""

    @property
    def is_empty(self) -> bool:
        return self.labels is None and self.mask is None

    def to(self, device: torch.device | str) -> "Condition":
        return self._map(lambda labels: labels.to(device), lambda mask: mask.to(device))

    def drop(self, dropped: Tensor, null_class: int) -> "Condition":
        """Return the condition with class and mask of the images `dropped`, bool [B], replaced by "any"."""
        return self._map(
            lambda labels: labels.masked_fill(dropped.to(labels.device), null_class),
            lambda mask: mask.masked_fill(dropped.to(mask.device)[:, None, None, None], 0.0),
        )

    def null(self, null_class: int) -> "Condition":
        """Return the condition that stands for any class and mask."""
        return self._map(lambda labels: torch.full_like(labels, null_class), torch.zeros_like)

    def add_mask(self, latents: Tensor) -> Tensor:
        """Return latents [B,C,h,w] with the mask as last channel, if there is one."""
        return latents if self.mask is None else torch.cat([latents, self.mask.to(latents)], dim=1)

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """Concatenate the conditions of several batches, which all have classes or masks, or have none."""
        labels = [each.labels for each in conditions if each.labels is not None]
        masks = [each.mask for each in conditions if each.mask is not None]
        return Condition(torch.cat(labels) if labels else None, torch.cat(masks) if masks else None)

    def _map(self, on_labels: Callable[[Tensor], Tensor], on_mask: Callable[[Tensor], Tensor]) -> "Condition":
        return Condition(
            None if self.labels is None else on_labels(self.labels), None if self.mask is None else on_mask(self.mask)
        )


def shrink_masks(masks: Tensor, size: int) -> Tensor:
    """Return masks uint8 [B,S,S] of 0 and 255 as a denoiser sees them, float32 [B,1,size,size]."""
    return F.adaptive_avg_pool2d((masks[:, None] > 0).float(), size) * 2 - 1
