"""A student with a mean teacher, and the teacher's input noise and weight update, for the methods that have one."""

import copy

import torch
from torch import Tensor, nn

from mgcc_dist.methods.method import Method
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.network import build_network


class StudentWithTeacher(Method):
    """A method whose teacher starts as a copy of the complete student. The student predicts."""

    def __init__(self, network: NetworkConfig) -> None:
        super().__init__()
        self.student = build_network(network)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def initialize(self, state: dict[str, Tensor]) -> None:
        super().initialize(state)
        self.teacher.load_state_dict(self.student.state_dict())

    def predictor(self) -> nn.Module:
        return self.student.inference_module()


def add_noise(images: Tensor) -> Tensor:
    """Add elementwise noise, clamp(0.2 N(0,1), -0.4, 0.4), to images in [-1,1].

    SSL4MIS adds half as much to images in [0,1].
    """
    return images + (0.2 * torch.randn_like(images)).clamp(-0.4, 0.4)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float, step: int) -> None:
    """Update the teacher's parameters: teacher = a * teacher + (1 - a) * student, a = min(1 - 1 / (step + 1), decay).

    After the first step (0) teacher and student are equal. Buffers are not touched: the teacher runs in training mode
    and has its own BN statistics.
    """
    decay = min(1 - 1 / (step + 1), decay)
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
