"""Exponential moving average of a module's weights."""

import copy

import torch
from torch import nn


class Ema:
    """A copy of a module whose parameters trail the trained ones; `module` is the copy, in evaluation mode.

    Decay warms up as min(decay, (1 + n) / (10 + n)) over n updates, so early averages are not stuck at the
    initial weights. Buffers (BatchNorm's running statistics) are copied, not averaged: they are averages already.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
        for average, current in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(current)
        self.updates += 1
