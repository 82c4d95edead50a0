"""The order of the samples of a stream within an epoch: a pure function of the seed, the stream and the epoch.

Without a window, it is a random permutation. For data of which only a part fits on the disk of a node, a window of W
shards gives an order that reads W shards at a time: the shards are permuted, taken in groups of W, and the samples of a
group are shuffled with each other. Either way each sample comes once in an epoch.

Evaluation reads samples in the order of the dataset (`evaluation_batches`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset


@dataclass(frozen=True)
class StreamItem:
    """One item of a stream: its offset, its index in the dataset, and the symmetry to apply."""

    offset: int
    index: int
    symmetry: int


@lru_cache(maxsize=8)
def permutation(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
    """Return the order int64 [size] of one epoch of a stream."""
    return _generator(seed, stream, epoch).permutation(size)


class WindowedOrder:
    """The order of a stream that reads `window` shards at a time; `shards` [size] numbers the shard of each sample."""

    def __init__(self, shards: np.ndarray, window: int) -> None:
        self.shards = np.unique(shards, return_inverse=True)[1]
        self.window = window

    def __call__(self, seed: int, stream: int, epoch: int) -> np.ndarray:
        """Return the order int64 [size] of one epoch."""
        return _windowed_permutation(self, seed, stream, epoch)


@lru_cache(maxsize=8)
def _windowed_permutation(order: WindowedOrder, seed: int, stream: int, epoch: int) -> np.ndarray:
    generator = _generator(seed, stream, epoch)
    group_of_shard = generator.permutation(order.shards.max() + 1) // order.window
    samples = generator.permutation(len(order.shards))
    return samples[np.argsort(group_of_shard[order.shards[samples]], kind="stable")]


def _generator(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))


def windowed_orders(datasets: Iterable[Any], window: int | None) -> dict[int, WindowedOrder]:
    """Return the order of each stream, by its number, that has a dataset; without a window none."""
    if not window:
        return {}
    return {i: WindowedOrder(_shard_numbers(dataset), window) for i, dataset in enumerate(datasets) if dataset}


def _shard_numbers(dataset: Any) -> np.ndarray:
    """Return for each sample of a shard folder, a subset or a concatenation a number of its shard, int64 [size]."""
    if isinstance(dataset, Subset):
        return _shard_numbers(dataset.dataset)[np.asarray(dataset.indices, np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts, first = [], 0
        for part in dataset.datasets:
            parts.append(_shard_numbers(part) + first)
            first = int(parts[-1].max(initial=first - 1)) + 1
        return np.concatenate(parts)
    return np.unique([record.shard for record in dataset.records], return_inverse=True)[1]


def evaluation_batches(size: int, batch: int, rank: int, world: int, in_step: bool) -> list[Sequence[int]]:
    """Return the indices into a dataset of `size` images of each batch of this rank: rank r has r, r + world, ...

    With `in_step` all ranks have the same number of batches, because a sharded network gathers its weights in each
    call. A rank with fewer batches ends with one that repeats a single image; `gather_by_index` drops its result.
    """
    mine = range(rank, size, world)
    batches: list[Sequence[int]] = [mine[start : start + batch] for start in range(0, len(mine), batch)]
    if in_step:
        of_first_rank = math.ceil(math.ceil(size / world) / batch)
        batches += [[rank % size]] * (of_first_rank - len(batches))
    return batches
