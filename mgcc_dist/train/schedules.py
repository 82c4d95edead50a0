"""Schedules of the learning rate and of the consistency loss's weight.

They count images or shares of the run, so that they are the same on any number of ranks: on more ranks a step has more
images.
"""

import math
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["poly", "constant", "cosine"]
Ramp = Literal["released", "compressed", "ssl4mis", "ssl4mis_compressed", "paper_0.1"]
ITERATION = 4
"""labeled images of one iteration of MGCC's released code, and of the baselines' as the paper ran them"""


@dataclass(frozen=True)
class Progress:
    """How far a run is, for methods."""

    step: int
    """optimizer steps done before this one"""
    total_steps: int
    """optimizer steps of the run"""
    epoch: float
    """epochs of the labeled images so far"""
    images: int
    """labeled images so far, over all ranks (all images if none are labeled)"""
    seed: int
    """the run's seed"""

    @property
    def iteration(self) -> int:
        """The iteration at which the released code had seen as many labeled images."""
        return self.images // ITERATION


def learning_rate_factor(schedule: Schedule, step: int, total: int, warmup: int = 0) -> float:
    """Return the factor in [0,1] of the peak learning rate at `step` (0, 1, ...); 0 from `total` on.

    It rises linearly over the first `warmup` steps (1/warmup, 2/warmup, ... 1). The schedule covers the steps after.
    """
    if step >= total:
        return 0.0
    if step < warmup:
        return (step + 1) / warmup
    step, total = step - warmup, total - warmup
    if schedule == "poly":
        return poly(step, total)
    if schedule == "cosine":
        return cosine(step, total)
    return constant(step, total)


def poly(step: int, total: int, power: float = 0.9) -> float:
    """Return (1 - step / total) ** power; 0 from `total` on, where the power of a negative number would be complex."""
    return max(0.0, 1 - step / total) ** power


def cosine(step: int, total: int) -> float:
    """Return half a cosine wave from 1 to 0; 0 from `total` on."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))


def constant(step: int, total: int) -> float:
    """Return 1; 0 from `total` on."""
    return float(step < total)


def consistency_weight(ramp: Ramp, progress: Progress) -> float:
    """Return lambda of Eq. 12, w_max * exp(-5 (1 - t / t_max)^2). The paper gives no w_max, so there are presets.

    released: w_max 7, t = iteration // 150, t_max 200, as in the released code, for any length of the run. A run of
    40,000 iterations ends at 7.0 (from iteration 30,000 on), one of 20,000 at 3.99, one of 10,000 at 0.74.
    ssl4mis: the same with w_max 0.1, as in the code that the baselines come from.
    compressed, ssl4mis_compressed: the ramps of these two over the released code's 20,000 iterations (half of the
    labels), scaled to this run's length: from 0.05 to 4.0, and from 0.0007 to 0.057. For short runs, in which the
    others stay near 0.
    paper_0.1: w_max 0.1, t = step, t_max = total_steps: the ramp covers the full run, as the paper describes it.
    """
    if ramp == "paper_0.1":
        return 0.1 * gaussian_ramp(progress.step, progress.total_steps)
    w_max = 0.1 if ramp.startswith("ssl4mis") else 7.0
    if ramp.endswith("compressed"):
        return w_max * gaussian_ramp(20_000 / 150 * progress.step / progress.total_steps, 200)
    return w_max * gaussian_ramp(progress.iteration // 150, 200)


def gaussian_ramp(t: float, t_max: float) -> float:
    """Return exp(-5 (1 - t / t_max)^2): e^-5 at 0, 1 from `t_max` on (Laine & Aila 2017, Section 3.3)."""
    return math.exp(-5 * (1 - min(1.0, t / t_max)) ** 2)
