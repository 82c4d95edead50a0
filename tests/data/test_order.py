"""The order of data larger than a disk: a few shards at a time, each sample once, and resumed anywhere."""

import numpy as np
import pytest
from torch.utils.data import ConcatDataset, Subset

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.loader import ImageTrainLoader, Ranks, Stream, StreamOffsets
from mgcc_dist.data.order import WindowedOrder, windowed_orders
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.shard_cache import ShardCache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six shards of four images."""
    return write_shards(Phantoms(count=24, seed=1, size=16), tmp_path_factory.mktemp("data") / "p", per_shard=4).folder


def loader(dataset, rank=0, world=1, window=2, workers=0) -> ImageTrainLoader:
    images = Stream(dataset, 2)
    settings = {"image_size": 16, "shard_window": window, "seed": 3, "ranks": Ranks(rank, world), "workers": workers}
    return ImageTrainLoader(None, images, **settings)


def keys(loader, start, steps) -> list[str]:
    batches = loader.batches(start)
    return [key for _ in range(steps) for key in next(batches)[0].keys]


def test_each_epoch_holds_each_sample_once_and_reads_a_window_of_shards_at_a_time():
    shards = np.repeat(np.arange(7), 5)
    order = WindowedOrder(shards, 3)
    epochs = [order(0, 1, epoch) for epoch in range(3)]
    for indices in epochs:
        assert sorted(indices) == list(range(35))
        groups = [set(shards[part].tolist()) for part in np.split(indices, [15, 30])]
        assert [len(group) for group in groups] == [3, 3, 1]
        assert len(set(shards[indices[:6]])) > 1  # shuffled, not one shard after the other
    assert len({tuple(indices) for indices in epochs}) == 3
    assert (WindowedOrder(shards, 3)(0, 1, 2) == epochs[2]).all()


def test_order_and_resume_are_the_same_on_any_number_of_ranks_and_workers(folder):
    shards = ShardFolder.open(folder)
    alone = keys(loader(shards), StreamOffsets(), 24)
    assert sorted(alone[:24]) == sorted(alone[24:]) == sorted(shards.keys())
    resumed = [keys(loader(shards, rank, 2, workers=rank), StreamOffsets(0, 20), 7) for rank in range(2)]
    steps = [[*first, *second] for first, second in zip(*(np.reshape(one, (-1, 2)) for one in resumed), strict=True)]
    assert np.reshape(steps, -1).tolist() == alone[20:]


def test_subsets_and_several_folders_are_ordered_by_their_shards(folder):
    shards = ShardFolder.open(folder)
    both = ConcatDataset([Subset(shards, [20, 0, 5]), shards])
    order = windowed_orders([None, both], 1)[1]
    assert order.shards.tolist() == [2, 0, 1, *np.repeat(np.arange(3, 9), 4)]


def test_a_small_cache_is_enough_and_each_shard_is_copied_once_per_epoch(folder, tmp_path):
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    cache = ShardCache(tmp_path, 3 * largest)
    shards = ShardFolder.open(folder, cache=cache)
    copied = []
    fetch = cache._make
    cache._make = lambda sha256, copy: (copied.append(sha256), fetch(sha256, copy))
    expected = keys(loader(ShardFolder.open(folder)), StreamOffsets(), 12)
    assert keys(loader(shards), StreamOffsets(), 12) == expected
    assert len(copied) == len(set(copied)) == 6
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= 3 * largest
    cache.require_room(window=2)
    with pytest.raises(UserError, match=r"data\.cache_gb: .* set data\.shard_window"):
        cache.require_room(window=None)
