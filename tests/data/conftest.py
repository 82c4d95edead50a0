"""What tests of more than one file read."""

import numpy as np
import pytest
from in_memory_dataset import InMemoryDataset

from mgcc_dist.data.records import ShardFolder, write_index, write_shard


@pytest.fixture(params=[1, 2, 7], ids=lambda shards: f"{shards} shards")
def shard_folder(tmp_path, request):
    """Seven labeled records in one, two or seven shards."""
    samples = [InMemoryDataset("l", 7)[i] for i in range(7)]
    groups = np.array_split(np.arange(7), request.param)
    shards = [write_shard(tmp_path / f"{n}.tar", [samples[i] for i in group]) for n, group in enumerate(groups)]
    write_index(tmp_path, "toy", shards)
    return ShardFolder.open(tmp_path)
