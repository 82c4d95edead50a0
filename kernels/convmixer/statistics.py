"""BatchNorm statistics across ranks (SyncBatchNorm), without synchronising host and device."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def merge_statistics(counts: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Merge the statistics of R sets of values: counts [R,1], means [R,C] and biased variances [R,C].

    Returns [3,C]: mean, biased variance, unbiased variance. The variance is the variance within the sets plus that of
    their means, without a difference of large squares.
    """
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    squares = (counts * (variances + (means - mean).square())).sum(0)
    return torch.stack([mean, squares / total, squares / (total - 1)])


def gather_statistics(stats: Tensor, count: int, group: str) -> None:
    """Replace this rank's stats [3,C], over `count` values per channel, by the statistics of the group."""
    process_group = _resolve(group)
    local = torch.cat([stats[:2].flatten(), stats.new_full((1,), count)])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, local, group=process_group)
    all_ranks = torch.stack(gathered)
    means, variances = all_ranks[:, :-1].unflatten(1, (2, -1)).unbind(1)
    stats.copy_(merge_statistics(all_ranks[:, -1:], means, variances))


def average_sums(sums: Tensor, count: int, group: str) -> None:
    """Replace this rank's sums [2,C], over `count` values per channel, by their mean over all values of the group."""
    all_ranks = torch.cat([sums.flatten(), sums.new_full((1,), count)])
    dist.all_reduce(all_ranks, group=_resolve(group))
    sums.copy_((all_ranks[:-1] / all_ranks[-1]).view_as(sums))


def _resolve(group: Any) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)
