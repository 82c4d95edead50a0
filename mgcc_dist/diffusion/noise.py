"""Random draws that belong to a sample, not to a process.

Every draw comes from a generator of its own, seeded by (seed, what it is for, the sample's place). So the noise that an
image meets does not depend on the rank that trains on it, on the world size, on the batch or on where a run was
resumed. The generators live on the CPU: the same numbers on every device.
"""

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch


class Draw(IntEnum):
    """What numbers are drawn for; draws for different things never share a generator's seed."""

    POSTERIOR = 1
    """the latent of a training image of the autoencoder"""
    DIFFUSION = 2
    """latent, time step and noise of a training image of the denoiser"""
    VALIDATION = 3
    """the same three for a held-out image"""
    SAMPLE = 4
    """the noise that a synthetic image starts from"""


def generators(seed: int, draw: Draw, places: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator a place, as diffusers' pipelines and `randn_tensor` take them."""
    return [torch.Generator().manual_seed(generator_seed(seed, draw, place)) for place in places]


def generator_seed(seed: int, draw: Draw, place: int) -> int:
    return int(np.random.SeedSequence((seed, draw, place)).generate_state(1, np.uint64)[0])
