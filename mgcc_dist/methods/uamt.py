"""Uncertainty-aware mean teacher, UA-MT (Yu et al. 2019), as implemented by SSL4MIS' 2D script."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgcc_dist.methods.config import UncertaintyAwareMeanTeacherConfig
from mgcc_dist.methods.losses import supervised_loss
from mgcc_dist.methods.method import weighted_losses
from mgcc_dist.methods.teacher import StudentWithTeacher, add_noise, update_teacher
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.train.schedules import Progress, consistency_weight, gaussian_ramp

if TYPE_CHECKING:
    from mgcc_dist.data.batch import Batch

TEACHER_PASSES = 8


class UncertaintyAwareMeanTeacher(StudentWithTeacher):
    """Mean teacher with the consistency loss only on pixels where the teacher's uncertainty is low.

    Uncertainty of a pixel: entropy of (p, 1 - p), with p the mean of eight noisy teacher passes, of which each forward
    computes two, so that BN sees both. Pixels below (0.75 + 0.25 ramp) ln 2 form the mask M. Consistency:
    sum(M d^2) / sum(M), where d is the difference between the student's probabilities and those of one more noisy
    teacher pass. The original has 2 sum(M) below, and above both classes, whose differences are equal. The student
    predicts.
    """

    def __init__(self, config: UncertaintyAwareMeanTeacherConfig, network: NetworkConfig) -> None:
        super().__init__(network)
        self.config = config

    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        n = batch.labeled
        with torch.no_grad():
            unlabeled = batch.images[n:]
            target = self.teacher(add_noise(unlabeled)).float().sigmoid()
            twice = unlabeled.repeat(2, 1, 1, 1)
            passes = [self.teacher(add_noise(twice)).float().sigmoid() for _ in range(TEACHER_PASSES // 2)]
            mean = torch.stack(passes).unflatten(1, (2, -1)).mean((0, 1))
            uncertainty = -(mean * (mean + 1e-6).log() + (1 - mean) * (1 - mean + 1e-6).log())
            threshold = (0.75 + 0.25 * gaussian_ramp(progress.step, progress.total_steps)) * math.log(2)
            mask = (uncertainty < threshold).float()
        logits = self.student(batch.images)
        difference = logits[n:].float().sigmoid() - target
        consistency = 2 * (mask * difference.square()).sum() / (2 * mask.sum() + 1e-16)
        weight = consistency_weight(self.config.ramp, progress)
        return weighted_losses(supervised_loss(logits[:n], batch.masks, self.config.dice_smooth), consistency, weight)

    def after_step(self, progress: Progress) -> None:
        update_teacher(self.teacher, self.student, self.config.teacher_decay, progress.step)
