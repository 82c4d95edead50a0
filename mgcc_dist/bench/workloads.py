"""The workloads of the benchmark, over all operations."""

from collections.abc import Iterator

import torch

from mgcc_dist.kernels.operation import Workload, specs
from mgcc_dist.models import blocks  # noqa: F401  registers the plain modules


def workloads(device_type: str, dtypes: list[torch.dtype], quick: bool) -> Iterator[Workload]:
    """Yield what to measure on "cuda" or "cpu". Training comes first, and in it each operation's first workload."""
    for dtype in dtypes:
        for training in (True, False):
            by_operation = [spec.workloads(device_type, dtype, training, quick) for spec in specs().values()]
            yield from (found[0] for found in by_operation if found)
            for found in by_operation:
                yield from found[1:]
