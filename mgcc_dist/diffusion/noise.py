"""Random numbers that belong to a sample, not to a process.

Every sample has its own generator, seeded by (seed, purpose, index of the sample). The noise that an image receives is
therefore independent of the rank that trains on it, of the world size, of the batch size and of where a run was
resumed. The generators live on the CPU, so all devices see the same numbers.
"""

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch


class RngStream(IntEnum):
    """What the random numbers are for; generators of different streams never share a seed."""

    POSTERIOR = 1
    """the latent of an autoencoder training image"""
    DIFFUSION = 2
    """latent, timestep and noise of a denoiser training image"""
    VALIDATION = 3
    """latent, timestep and noise of a validation image"""
    SAMPLE = 4
    """the initial noise of a synthetic image"""
    MASK = 5
    """the mask of a synthetic image"""


def make_generators(seed: int, stream: RngStream, indices: Iterable[int]) -> list[torch.Generator]:
    """Return one CPU generator per index, in the form that diffusers' pipelines and `randn_tensor` take."""
    return [torch.Generator().manual_seed(generator_seed(seed, stream, index)) for index in indices]


def generator_seed(seed: int, stream: RngStream, index: int) -> int:
    """Return the seed, 64 bits, of the generator of an index in a stream."""
    return int(np.random.SeedSequence((seed, stream, index)).generate_state(1, np.uint64)[0])
