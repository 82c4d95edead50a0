"""Sources by number: parts of them, several as one, and all at one size."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory import SIZE, Memory

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.sources import Concat, Resized, Subset, subset_by_keys


@settings(deadline=None, derandomize=True, max_examples=30)
@given(kept=st.integers(0, 8), masks=st.booleans(), reads=st.lists(st.integers(0, 5), max_size=30))
def test_samples_are_decoded_once_while_there_is_room_and_stay_the_same(kept, masks, reads):
    source = Memory("l", 6, shape=(SIZE + 3, SIZE - 2), labeled=masks)
    decoded = []
    monitored = Subset(source, range(6))
    monitored.read = lambda i: decoded.append(i) or source.read(i)
    sample_bytes = SIZE * SIZE * (2 if masks else 1)
    resized, plain = Resized(monitored, SIZE, kept * sample_bytes), Resized(source, SIZE)
    for i in reads:
        ours, theirs = resized.read(i), plain.read(i)
        assert ours.key == theirs.key
        assert ours.image.shape == (SIZE, SIZE)
        assert np.array_equal(ours.image, theirs.image)
        assert np.array_equal(ours.mask, theirs.mask) if masks else ours.mask is None
    stay = list(dict.fromkeys(reads))[:kept]
    assert decoded == [i for at, i in enumerate(reads) if i not in stay or i not in reads[:at]]


def test_decoded_samples_are_not_sent_to_other_processes():
    resized = Resized(Memory("l", 2), SIZE, kept_bytes=2 * 2 * SIZE * SIZE)
    empty = len(pickle.dumps(resized))
    resized.read(0)
    assert len(pickle.dumps(resized)) == empty


def test_subset_and_concat_count_through():
    both = Concat([Memory("a", 2), Subset(Memory("b", 5), [4, 1]), Memory("c", 1)])
    assert len(both) == 5
    assert [both.read(i).key for i in range(5)] == ["a0", "a1", "b4", "b1", "c0"]
    with pytest.raises(IndexError):
        both.read(5)


def test_subset_by_keys_is_in_the_order_of_the_keys(shard_folder):
    subset = subset_by_keys(shard_folder, ["l4", "l0", "l6"])
    assert [subset.read(i).key for i in range(3)] == ["l4", "l0", "l6"]


def test_subset_by_keys_names_the_first_that_are_missing(shard_folder):
    with pytest.raises(
        UserError, match=r"lacks 6 of the 7 keys asked for: 'x0', 'x1', 'x2', 'x3', 'x4', \.\.\.; is the"
    ):
        subset_by_keys(shard_folder, ["l1", *(f"x{i}" for i in range(6))])
