"""MGCC's network taught by a CutMix mean teacher; not in the paper.

MGCC's auxiliary decoders see perturbed features but the very image that the main decoder sees, so nothing asks the
network to know a lesion by itself where its surroundings change. Mixing two unlabeled images does (CutMix for
segmentation, French et al. 2020): a mean teacher predicts both, a box is pasted from one into the other, in images and
predictions alike, and all decoders, through their perturbations, are to find the pasted prediction.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mgcc_dist.methods.config import MethodConfig
from mgcc_dist.methods.losses import probability_mse, supervised_loss
from mgcc_dist.methods.method import Method, total
from mgcc_dist.methods.teacher import update_teacher
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.registry import build_network
from mgcc_dist.train.schedules import Progress, consistency_weight

if TYPE_CHECKING:
    from mgcc_dist.data.loader import Batch

SURE = 0.97  # French et al. 2020: the loss counts by the share of pixels that the teacher is as sure of as this


class CutMixTeacher(Method):
    """Supervised: Eq. 9 and 10. Unlabeled: the mean over all decoders of MSE to the mixed predictions, times certainty.

    The teacher is the predicting part of the network: parameters averaged, BN statistics copied, in evaluation mode.
    """

    networks = ("mgcc", "cct")

    def __init__(self, config: MethodConfig, network: NetworkConfig) -> None:
        super().__init__(config, network)
        self.network = build_network(network)
        self.teacher = copy.deepcopy(self.network.inference_module()).requires_grad_(False)

    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        n, unlabeled = batch.labeled, batch.images[batch.labeled :]
        with torch.no_grad():
            predicted = self.teacher.eval()(unlabeled).float().sigmoid()
            certainty = (torch.maximum(predicted, 1 - predicted) > SURE).float().mean()
        pasted = boxes(unlabeled)
        mixed = torch.where(pasted, unlabeled.roll(1, 0), unlabeled)
        target = torch.where(pasted, predicted.roll(1, 0), predicted)

        main, auxiliary = self.network(torch.cat((batch.images[:n], mixed)))
        decoders = (main, *auxiliary)
        supervised = torch.stack([supervised_loss(y[:n], batch.masks) for y in decoders]).mean()
        consistency = certainty * torch.stack([probability_mse(y[n:], target) for y in decoders]).mean()
        return total(supervised, consistency, consistency_weight(self.config.ramp, progress))

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        student = self.network.inference_module()
        update_teacher(self.teacher, student, self.config.teacher_decay, progress.step)
        torch._foreach_copy_(list(self.teacher.buffers()), list(student.buffers()))

    def predictor(self) -> nn.Module:
        return self.network.inference_module()


def boxes(images: Tensor) -> Tensor:
    """One box an image, half of its area, of random shape and place: bool [B,1,H,W] for images [B,C,H,W]."""
    count, _, height, width = images.shape
    share, top, left = torch.rand(3, count, 1, 1, device=images.device)
    tall, wide = 0.5**share, 0.5 ** (1 - share)  # shares of the sides; their product is a half
    rows = (torch.arange(height, device=images.device)[:, None] + 0.5) / height
    columns = (torch.arange(width, device=images.device)[None, :] + 0.5) / width
    inside_rows = (rows >= top * (1 - tall)) & (rows < top * (1 - tall) + tall)
    inside_columns = (columns >= left * (1 - wide)) & (columns < left * (1 - wide) + wide)
    return (inside_rows & inside_columns)[:, None]
