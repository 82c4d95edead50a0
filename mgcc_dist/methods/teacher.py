"""Input noise and weight update of a mean teacher, shared by all methods that have one."""

import torch
from torch import Tensor, nn


def add_noise(images: Tensor) -> Tensor:
    """Add elementwise noise, clamp(0.1 N(0,1), -0.2, 0.2)."""
    return images + (0.1 * torch.randn_like(images)).clamp(-0.2, 0.2)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float, step: int) -> None:
    """Update the teacher's parameters: teacher = a * teacher + (1 - a) * student, a = min(1 - 1 / (step + 1), decay).

    After the first step (0) teacher and student are equal. Buffers are not touched: the teacher runs in training mode
    and has its own BN statistics.
    """
    decay = min(1 - 1 / (step + 1), decay)
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
