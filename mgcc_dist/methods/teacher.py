"""What methods with a mean teacher share: the teacher's input noise and its update."""

import torch
from torch import Tensor, nn


def noisy(images: Tensor) -> Tensor:
    """Images + clamp(0.1 N(0,1), -0.2, 0.2), element by element."""
    return images + (0.1 * torch.randn_like(images)).clamp(-0.2, 0.2)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float, step: int) -> None:
    """Move the teacher's parameters towards the student's: teacher = a teacher + (1 - a) student.

    a = min(1 - 1 / (step + 1), decay), so that after the first step (0) teacher and student are equal. Parameters only:
    the teacher runs in training mode and keeps BN statistics of its own.
    """
    decay = min(1 - 1 / (step + 1), decay)
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
