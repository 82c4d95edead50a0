"""Bidirectional copy-paste, BCP (Bai et al. 2023), as implemented by its authors for 2D images."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mgcc_dist.evaluation.postprocess import Postprocess
from mgcc_dist.methods.config import BidirectionalCopyPasteConfig
from mgcc_dist.methods.losses import two_class_dice_loss
from mgcc_dist.methods.method import weighted_losses
from mgcc_dist.methods.teacher import StudentWithTeacher, update_teacher
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.train.schedules import Progress

if TYPE_CHECKING:
    from mgcc_dist.data.batch import Batch


class BidirectionalCopyPaste(StudentWithTeacher):
    """A box of a labeled image is pasted into an unlabeled one and the other way round; the student learns both.

    Masks of unlabeled pixels are the largest component of the teacher's prediction. In the first part of the run the
    student learns from labeled images pasted into each other, and the teacher is its copy. The student predicts.
    """

    def __init__(self, config: BidirectionalCopyPasteConfig, network: NetworkConfig) -> None:
        super().__init__(network)
        self.config = config

    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        n = batch.labeled
        labeled, masks, unlabeled = batch.images[:n], batch.masks, batch.images[n:]
        inside = random_box(labeled)
        if self._pretraining(progress):
            logits = self.student(torch.where(inside, labeled.roll(1, 0), labeled))
            supervised = region_loss(logits, masks, ~inside) + region_loss(logits, masks.roll(1, 0), inside)
            return weighted_losses(supervised, supervised.new_zeros(()), 0.0)

        with torch.no_grad():
            pseudo = largest_components(self.teacher(batch.weak_images[n:]) > 0)
        source = torch.arange(len(unlabeled), device=inside.device) % n  # labeled image pasted into each unlabeled one
        inward = self.student(torch.where(inside, labeled[source], unlabeled))
        target = (torch.arange(n, device=inside.device) + 1) % len(unlabeled)  # and unlabeled into each labeled one
        outward = self.student(torch.where(inside, unlabeled[target], labeled))
        supervised = region_loss(inward, masks[source], inside) + region_loss(outward, masks, ~inside)
        consistency = region_loss(inward, pseudo, ~inside) + region_loss(outward, pseudo[target], inside)
        return weighted_losses(supervised, consistency, self.config.unlabeled_weight)

    def after_step(self, progress: Progress) -> None:
        step = 0 if self._pretraining(progress) else progress.step  # an update at step 0 copies the student
        update_teacher(self.teacher, self.student, self.config.teacher_decay, step)

    def _pretraining(self, progress: Progress) -> bool:
        return progress.step < self.config.pretraining * progress.total_steps


def random_box(images: Tensor) -> Tensor:
    """Draw the box of a batch, two thirds of the image's height and width: bool [1,1,H,W] for [B,C,H,W]."""
    inside = []
    for size, draw in zip(images.shape[2:], torch.rand(2, device=images.device), strict=True):
        side = size * 2 // 3
        start = (draw * (size - side)).floor()
        pixels = torch.arange(size, device=images.device)
        inside.append((pixels >= start) & (pixels < start + side))
    return (inside[0][:, None] & inside[1][None, :])[None, None]


def region_loss(logits: Tensor, masks: Tensor, region: Tensor) -> Tensor:
    """Compute half the sum of BCE and two-class Dice of logits [B,1,H,W] on the pixels of `region` [1,1,H,W]."""
    pixels = region.float().expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits.float(), masks, reduction="none")
    return ((bce * pixels).sum() / pixels.sum() + two_class_dice_loss(logits, masks, pixels)) / 2


def largest_components(masks: Tensor) -> Tensor:
    """Keep the largest component of each mask, bool [U,1,H,W] to float; computed on the CPU, so it waits for a GPU."""
    keep, kept = Postprocess(largest=True), masks.cpu()
    for mask in kept[:, 0]:
        mask.copy_(torch.from_numpy(keep(mask.numpy())))
    return kept.to(masks.device).float()
