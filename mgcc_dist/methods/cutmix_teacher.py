"""MGCC's network with a CutMix mean teacher. Not in the paper.

MGCC's auxiliary decoders see perturbed features of the same image as the main decoder, so nothing trains the network to
recognise a lesion in other surroundings. CutMix for segmentation (French et al. 2020) does: a mean teacher predicts two
unlabeled images, a box is pasted from one into the other, in the images and in the predictions, and all decoders learn
the mixed prediction under their perturbations.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mgcc_dist.methods.boxes import box_masks, cut_mix
from mgcc_dist.methods.config import CutMixTeacherConfig
from mgcc_dist.methods.losses import mean_supervised_loss, probability_mse
from mgcc_dist.methods.method import Method, weighted_losses
from mgcc_dist.methods.teacher import update_teacher
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.train.schedules import Progress, consistency_weight

if TYPE_CHECKING:
    from mgcc_dist.data.batch import Batch

# French et al. 2020: the loss is weighted by the fraction of pixels on which the teacher is at least this confident.
CONFIDENCE_THRESHOLD = 0.97


class CutMixTeacher(Method):
    """Supervised: Eq. 9 and 10. Consistency: mean over all decoders of MSE to the mixed prediction, times confidence.

    The teacher is the inference part of the network: parameters averaged, BN statistics copied, in evaluation mode.
    """

    def __init__(self, config: CutMixTeacherConfig, network: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.network = build_network(network)
        self.teacher = copy.deepcopy(self.network.inference_module()).requires_grad_(False)

    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        n, unlabeled = batch.labeled, batch.images[batch.labeled :]
        with torch.no_grad():
            predicted = self.teacher.eval()(unlabeled).float().sigmoid()
            confident_fraction = (torch.maximum(predicted, 1 - predicted) > CONFIDENCE_THRESHOLD).float().mean()
        mixed, target = cut_mix(random_boxes(unlabeled), unlabeled, predicted)

        main, auxiliary = self.network(torch.cat((batch.images[:n], mixed)))
        decoders = (main, *auxiliary)
        supervised = mean_supervised_loss([y[:n] for y in decoders], batch.masks, self.config.dice_smooth)
        consistency = confident_fraction * torch.stack([probability_mse(y[n:], target) for y in decoders]).mean()
        return weighted_losses(supervised, consistency, consistency_weight(self.config.ramp, progress))

    def initialize(self, state: dict[str, Tensor]) -> None:
        super().initialize(state)
        self.teacher.load_state_dict(state)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        student = self.network.inference_module()
        update_teacher(self.teacher, student, self.config.teacher_decay, progress.step)
        torch._foreach_copy_(list(self.teacher.buffers()), list(student.buffers()))

    def predictor(self) -> nn.Module:
        return self.network.inference_module()


def random_boxes(images: Tensor) -> Tensor:
    """Draw one box per image of random shape and location, half the image's area: bool [B,1,H,W] for [B,C,H,W]."""
    exponent, top, left = torch.rand(3, len(images), 1, 1, device=images.device)
    height, width = 0.5**exponent, 0.5 ** (1 - exponent)  # relative to the image; their product is 1/2
    return box_masks(images, height, width, top, left)
