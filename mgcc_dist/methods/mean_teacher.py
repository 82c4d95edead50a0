"""Mean teacher, MT (Tarvainen & Valpola 2017), as implemented by SSL4MIS' 2D script."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgcc_dist.common.errors import UserError
from mgcc_dist.methods.config import MeanTeacherConfig
from mgcc_dist.methods.losses import probability_mse, supervised_loss
from mgcc_dist.methods.method import weighted_losses
from mgcc_dist.methods.teacher import StudentWithTeacher, add_noise, update_teacher
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.train.schedules import ITERATION, Progress, consistency_weight

if TYPE_CHECKING:
    from mgcc_dist.data.batch import Batch


class MeanTeacher(StudentWithTeacher):
    """The student learns from labels, and on unlabeled images matches an exponential moving average of itself.

    Consistency: MSE between the student's probabilities and those of the teacher on noisy inputs. The student predicts.
    """

    def __init__(self, config: MeanTeacherConfig, network: NetworkConfig) -> None:
        super().__init__(network)
        self.config = config

    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        n = batch.labeled
        with torch.no_grad():
            target = self.teacher(add_noise(batch.images[n:])).float().sigmoid()
        logits = self.student(batch.images)
        started = progress.iteration >= self.config.teacher_start
        weight = consistency_weight(self.config.ramp, progress) if started else 0.0
        supervised = supervised_loss(logits[:n], batch.masks, self.config.dice_smooth)
        return weighted_losses(supervised, probability_mse(logits[n:], target), weight)

    def check_length(self, images: int) -> None:
        iterations = images // ITERATION
        if self.config.teacher_start >= iterations:
            raise UserError(
                f"method.teacher_start: the run has {iterations} iterations of {ITERATION} labeled images, so the "
                f"consistency loss, which starts at iteration {self.config.teacher_start}, would stay off. Set it to "
                f"{iterations // 20}, or train longer."
            )

    def after_step(self, progress: Progress) -> None:
        update_teacher(self.teacher, self.student, self.config.teacher_decay, progress.step)
