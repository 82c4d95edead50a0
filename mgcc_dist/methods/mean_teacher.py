"""Mean teacher, MT (Tarvainen & Valpola 2017), as implemented by SSL4MIS' 2D script."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mgcc_dist.common.errors import UserError
from mgcc_dist.methods.config import MeanTeacherConfig
from mgcc_dist.methods.losses import probability_mse, supervised_loss
from mgcc_dist.methods.method import Method, weighted_losses
from mgcc_dist.methods.teacher import add_noise, update_teacher
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.train.schedules import Progress, consistency_weight

if TYPE_CHECKING:
    from mgcc_dist.data.loader import Batch


class MeanTeacher(Method):
    """The student learns from labels, and on unlabeled images matches an exponential moving average of itself.

    Consistency: MSE between the student's probabilities and those of the teacher on noisy inputs. The student predicts.
    """

    def __init__(self, config: MeanTeacherConfig, network: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.student = build_network(network)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        n = batch.labeled
        with torch.no_grad():
            target = self.teacher(add_noise(batch.images[n:])).float().sigmoid()
        logits = self.student(batch.images)
        weight = consistency_weight(self.config.ramp, progress) if progress.step >= self.config.teacher_start else 0.0
        return weighted_losses(supervised_loss(logits[:n], batch.masks), probability_mse(logits[n:], target), weight)

    def initialize(self, state: dict[str, Tensor]) -> None:
        super().initialize(state)
        self.teacher.load_state_dict(self.student.state_dict())

    def check_length(self, steps: int) -> None:
        if self.config.teacher_start >= steps:
            raise UserError(
                f"method.teacher_start: the run has {steps} steps, so the consistency loss, which starts at step "
                f"{self.config.teacher_start}, would stay off. Set it to {steps // 20}, or train longer."
            )

    def after_step(self, progress: Progress) -> None:
        update_teacher(self.teacher, self.student, self.config.teacher_decay, progress.step)

    def predictor(self) -> nn.Module:
        return self.student.inference_module()
