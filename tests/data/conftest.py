"""Fixtures that several test files use."""

import numpy as np
import pytest
from in_memory_dataset import InMemoryDataset

from mgcc_dist.data.records import ShardFolder, write_index, write_shard


@pytest.fixture(params=[1, 2, 7], ids=lambda shards: f"{shards} shards")
def shard_folder(tmp_path, request):
    """Seven labeled records in one, two or seven shards."""
    dataset = InMemoryDataset("l", 7)
    parts = np.array_split(np.arange(7), request.param)
    shards = [write_shard(tmp_path / f"{n}.tar", [dataset[i] for i in part]) for n, part in enumerate(parts)]
    write_index(tmp_path, "toy", shards)
    return ShardFolder.open(tmp_path)
