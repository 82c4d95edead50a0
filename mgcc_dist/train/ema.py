"""Exponential moving average (EMA) of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """Averages of `weights`, the fp32 tensors that this rank trains: full parameters, or its shards under ZeRO.

    Averaging is elementwise, so shards need no gathering, and the averages of all ranks together take 4 bytes per
    parameter. The decay warms up as min(decay, (1 + n) / (10 + n)) over n updates, so early averages are not stuck at
    the initial weights. Only trained parameters are averaged. Buffers (BatchNorm's running statistics) and parameters
    that are not trained (a mean teacher) are averages already, or fixed, and are used as they are.
    """

    def __init__(self, weights: list[Tensor], decay: float) -> None:
        self._weights = weights
        self.averages = [weight.detach().clone() for weight in weights]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self._weights, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap averages and weights inside the context, and swap them back at its end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self._weights, self.averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)  # in place, because DeepSpeed's optimizer holds views of it
            average.copy_(kept)
