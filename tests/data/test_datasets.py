"""Resized samples with a cache, and subsets of a shard folder by key."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory_dataset import SIZE, InMemoryDataset
from torch.utils.data import ConcatDataset, Subset

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.datasets import ResizedDataset, labeled_subset, subset_by_keys
from mgcc_dist.data.records import ShardFolder, write_index, write_shard


class CountingDataset(InMemoryDataset):
    """Records the index of every access."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accessed = []

    def __getitem__(self, index):
        self.accessed.append(index)
        return super().__getitem__(index)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(cached=st.integers(0, 8), masks=st.booleans(), indices=st.lists(st.integers(0, 5), max_size=30))
def test_samples_are_decoded_once_until_the_cache_is_full(cached, masks, indices):
    dataset = CountingDataset("l", 6, shape=(SIZE + 3, SIZE - 2), labeled=masks)
    sample_bytes = SIZE * SIZE * (2 if masks else 1)
    resized = ResizedDataset(dataset, SIZE, cached * sample_bytes)
    uncached = ResizedDataset(InMemoryDataset("l", 6, shape=(SIZE + 3, SIZE - 2), labeled=masks), SIZE)
    for index in indices:
        ours, expected = resized[index], uncached[index]
        assert ours.key == expected.key
        assert ours.image.shape == (SIZE, SIZE)
        assert np.array_equal(ours.image, expected.image)
        assert np.array_equal(ours.mask, expected.mask) if masks else ours.mask is None
    first_seen = list(dict.fromkeys(indices))[:cached]
    assert dataset.accessed == [
        index for i, index in enumerate(indices) if index not in first_seen or index not in indices[:i]
    ]


def test_cached_samples_are_not_pickled():
    resized = ResizedDataset(InMemoryDataset("l", 2), SIZE, cache_bytes=2 * 2 * SIZE * SIZE)
    empty = len(pickle.dumps(resized))
    assert resized[0].key == "l0"
    assert len(pickle.dumps(resized)) == empty


def test_torch_subsets_and_concatenations_of_shard_folders_have_the_right_samples(shard_folder):
    both = ConcatDataset([InMemoryDataset("a", 2), Subset(shard_folder, [4, 1])])
    resized = ResizedDataset(both, SIZE)
    assert [resized[i].key for i in range(len(resized))] == ["a0", "a1", "l4", "l1"]


def test_subset_by_keys_keeps_the_order_of_the_keys(shard_folder):
    subset = subset_by_keys(shard_folder, ["l4", "l0", "l6"])
    assert [subset[i].key for i in range(3)] == ["l4", "l0", "l6"]


def test_subset_by_keys_names_the_first_missing_keys(shard_folder):
    expected = r"6 of 7 requested keys are missing: 'x0', 'x1', 'x2', 'x3', 'x4', \.\.\.\. Check that the split"
    with pytest.raises(UserError, match=expected):
        subset_by_keys(shard_folder, ["l1", *(f"x{i}" for i in range(6))])


def test_labeled_subset_names_records_without_a_mask(tmp_path):
    labeled, unlabeled = InMemoryDataset("l", 3), InMemoryDataset("u", 2, labeled=False)
    samples = [*(labeled[i] for i in range(3)), *(unlabeled[i] for i in range(2))]
    write_index(tmp_path, "toy", [write_shard(tmp_path / "0.tar", samples)])
    folder = ShardFolder.open(tmp_path)
    subset = labeled_subset(folder, ["l2", "l0"], "validation")
    assert [subset[i].key for i in range(2)] == ["l2", "l0"]
    with pytest.raises(UserError, match=r"1 of the split's 2 labeled records have no mask, the first is 'u1'\. Make"):
        labeled_subset(folder, ["l0", "u1"], "labeled")
    with pytest.raises(UserError, match=r"^data\.split: has no labeled records, and `mgcc segment` needs some"):
        labeled_subset(folder, [], "labeled")
