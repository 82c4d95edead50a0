"""Which rank gets which sample, for any number of ranks, workers, shards and batch sizes."""

from collections import Counter
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory_dataset import SIZE, InMemoryDataset
from torch.utils.data import ConcatDataset

from mgcc_dist.common.distributed import gather_by_index
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.augment import symmetry
from mgcc_dist.data.batch import Batch
from mgcc_dist.data.loader import EvalLoader, ImageTrainLoader, Ranks, Stream, StreamOffsets
from mgcc_dist.data.order import evaluation_batches

few = settings(deadline=None, derandomize=True, max_examples=30)


def loader(rank=0, world=1, labeled=7, unlabeled=5, batches=(2, 2), workers=0, seed=3, augment="symmetries"):
    """A loader of one rank; the unlabeled records have masks too, which batches must not contain."""
    return ImageTrainLoader(
        Stream(InMemoryDataset("l", labeled), batches[0]) if batches[0] else None,
        Stream(InMemoryDataset("u", unlabeled), batches[1]) if batches[1] else None,
        image_size=SIZE,
        seed=seed,
        ranks=Ranks(rank, world),
        workers=workers,
        augment=augment,
    )


def take(stream_loader, steps, start=None):
    with closing(stream_loader.batches(start or StreamOffsets())) as batches:
        return [(batch.to("cpu"), offsets) for batch, offsets in islice(batches, steps)]


def evaluate(dataset, batch, size=SIZE, rank=0, world=1, workers=0):
    return [loaded.to("cpu") for loaded in EvalLoader(dataset, batch, size, Ranks(rank, world), workers).batches()]


def streams(world, steps, start=None, **settings):
    """Both streams over all ranks as {offset: (key, image, mask)}, and the stream offsets at the end."""
    seen = ({}, {})
    ends = set()
    for rank in range(world):
        taken = take(loader(rank, world, **settings), steps, start)
        ends.add(taken[-1][1])
        for batch, _ in taken:
            for row, offset in enumerate(batch.offsets.tolist()):
                stream = seen[row >= batch.labeled]
                assert offset not in stream, "two ranks or steps have the same offset"
                mask = batch.masks[row].numpy().tobytes() if row < batch.labeled else None
                stream[offset] = (batch.keys[row], batch.images[row].numpy().tobytes(), mask)
    assert len(ends) == 1, "ranks don't agree on the offsets"
    return seen[0], seen[1], ends.pop()


ranks = st.integers(1, 5)
sizes = st.integers(1, 12)
batch_sizes = st.integers(1, 4)


@few
@given(
    world=ranks, labeled=sizes, unlabeled=sizes, batches=st.tuples(batch_sizes, batch_sizes), seed=st.integers(0, 99)
)
def test_every_epoch_has_each_sample_exactly_once(world, labeled, unlabeled, batches, seed):
    steps = 3 * max(labeled, unlabeled) // world + 1
    seen = streams(world, steps, labeled=labeled, unlabeled=unlabeled, batches=batches, seed=seed)
    for stream, name, count, batch in ((seen[0], "l", labeled, batches[0]), (seen[1], "u", unlabeled, batches[1])):
        assert sorted(stream) == list(range(steps * world * batch)), "offsets are skipped"
        for epoch in range(len(stream) // count):
            keys = [stream[offset][0] for offset in range(epoch * count, (epoch + 1) * count)]
            assert sorted(keys) == sorted(f"{name}{i}" for i in range(count))


@few
@given(world=ranks, labeled=sizes, unlabeled=sizes, batches=st.tuples(st.integers(0, 4), batch_sizes))
def test_every_rank_has_full_batches_and_the_same_offsets_at_each_step(world, labeled, unlabeled, batches):
    taken = [take(loader(r, world, labeled=labeled, unlabeled=unlabeled, batches=batches), 5) for r in range(world)]
    for step in range(5):
        assert {rank[step][1] for rank in taken} == {
            StreamOffsets((step + 1) * world * batches[0], (step + 1) * world * batches[1])
        }
        for rank in taken:
            batch = rank[step][0]
            assert batch.images.shape == (sum(batches), 1, SIZE, SIZE)
            assert batch.masks.shape == (batches[0], 1, SIZE, SIZE)
            assert batch.labeled == batches[0]
            assert len(batch.offsets) == len(batch.keys) == sum(batches)


@few
@given(world=ranks, more=ranks, count=sizes, batches=st.tuples(batch_sizes, batch_sizes), stopped=st.integers(0, 4))
def test_labeled_synthetic_images_come_in_order_next_to_unchanged_real_ones(world, more, count, batches, stopped):
    """A run on `world` ranks is resumed on `more`: each synthetic image once per epoch, masks of all labeled images."""
    (real, pairs), steps = batches, 2 * count + 1

    def with_pairs(rank, ranks):
        settings = {"image_size": SIZE, "seed": 3, "ranks": Ranks(rank, ranks), "augment": "symmetries"}
        streams = Stream(InMemoryDataset("l", 7), real), Stream(InMemoryDataset("u", 5), 2)
        return ImageTrainLoader(*streams, synthetic=Stream(InMemoryDataset("s", count), pairs), **settings)

    seen, start = {}, StreamOffsets()
    for ranks_now, length in ((world, stopped), (more, steps)):
        for rank in range(ranks_now if length else 0):
            plain = take(loader(rank, ranks_now, batches=(real, 2)), length, start)
            for (batch, end), (without, end_without) in zip(
                take(with_pairs(rank, ranks_now), length, start), plain, strict=True
            ):
                assert end == end_without, "real images are seen as often as without synthetic ones"
                assert batch.labeled == real + pairs
                torch.testing.assert_close(batch.images[:real], without.images[:real], rtol=0, atol=0)
                torch.testing.assert_close(batch.images[batch.labeled :], without.images[real:], rtol=0, atol=0)
                for row in range(real, batch.labeled):
                    mask = (batch.images[row] > 0).float()  # of InMemoryDataset, under the same symmetry
                    torch.testing.assert_close(batch.masks[row], mask, rtol=0, atol=0)
                    offset = int(batch.offsets[row])
                    assert offset not in seen, "two ranks or steps have the same offset"
                    seen[offset] = batch.keys[row]
            after = end
        start = after if length else start
    assert sorted(seen) == list(range(len(seen))), "offsets are skipped"
    for epoch in range(len(seen) // count):
        keys = {seen[offset] for offset in range(epoch * count, (epoch + 1) * count)}
        assert keys == {f"s{i}" for i in range(count)}


@few
@given(world=ranks, batch=st.integers(1, 3))
def test_samples_do_not_depend_on_the_number_of_ranks(world, batch):
    """Compare keys, augmented images and masks at every offset."""
    many = streams(world, 6, batches=(batch, batch))
    one = streams(1, 6 * world, batches=(batch, batch))
    assert many == one


@settings(deadline=None, derandomize=True, max_examples=4)
@given(world=st.integers(1, 3), workers=st.integers(1, 2), batch=st.integers(1, 3))
def test_batches_do_not_depend_on_the_number_of_workers(world, workers, batch):
    for rank in range(world):
        assert_same_batches(
            take(loader(rank, world, batches=(batch, batch), workers=workers), 7),
            take(loader(rank, world, batches=(batch, batch)), 7),
        )


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for (a, after_a), (b, after_b) in zip(ours, theirs, strict=True):
        assert after_a == after_b
        assert a.keys == b.keys
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.masks, b.masks)
        assert torch.equal(a.offsets, b.offsets)


@settings(deadline=None, derandomize=True, max_examples=10)
@given(stop=st.integers(1, 9), workers=st.sampled_from([0, 0, 0, 2]))
def test_resume_at_any_step_gives_the_same_batches(stop, workers):
    uninterrupted = take(loader(1, 2, workers=workers), 12)
    resumed = take(loader(1, 2, workers=workers), 12 - stop, start=uninterrupted[stop - 1][1])
    assert_same_batches(resumed, uninterrupted[stop:])


@few
@given(before=ranks, after=ranks, steps=st.integers(1, 5))
def test_resume_on_other_world_size_sees_the_same_samples(before, after, steps):
    first = streams(before, steps)
    resumed = streams(after, 6, start=first[2])
    uninterrupted = streams(1, steps * before + 6 * after)
    assert first[0] | resumed[0] == uninterrupted[0]
    assert first[1] | resumed[1] == uninterrupted[1]
    assert resumed[2] == uninterrupted[2]


def test_epochs_seeds_and_streams_have_different_orders():
    def order(stream, epoch, seed):
        seen = streams(1, 40, batches=(1, 1), labeled=20, unlabeled=20, seed=seed)[stream]
        return tuple(seen[offset][0][1:] for offset in range(20 * epoch, 20 * epoch + 20))

    assert len({order(stream, epoch, seed) for stream in (0, 1) for epoch in (0, 1) for seed in (3, 4)}) == 8


def test_epoch_order_follows_the_documented_formula():
    """Runs resumed by a later version depend on the formula in the module docstring."""
    seen = streams(2, 6, labeled=7, batches=(2, 2))[0]
    for offset, (key, *_) in seen.items():
        seed_sequence = np.random.SeedSequence((3, 0, offset // 7))
        order = np.random.Generator(np.random.PCG64(seed_sequence)).permutation(7)
        assert key == f"l{order[offset % 7]}"
    assert "".join(seen[offset][0] for offset in range(7)) == "l5l6l2l1l4l3l0"


def test_rank_r_gets_the_rth_block_of_offsets():
    for rank in range(3):
        (batch, _), *_ = take(loader(rank, 3, batches=(2, 1)), 1)
        assert batch.offsets.tolist() == [2 * rank, 2 * rank + 1, rank]


def test_image_and_mask_are_rotated_and_flipped_together():
    """Image and mask always have the same symmetry, and all eight occur within 60 samples."""
    dataset = InMemoryDataset("l", 1)
    record = dataset[0]
    symmetries = {as_image(symmetry(record.image, index)).tobytes(): index for index in range(8)}
    found = Counter()
    for batch, _ in take(loader(labeled=1, batches=(2, 2)), 30):
        for image, mask in zip(batch.images.numpy(), batch.masks.numpy(), strict=False):
            index = symmetries[image[0].tobytes()]
            np.testing.assert_array_equal(mask[0], symmetry(record.mask, index) / 255)
            found[index] += 1
    assert sorted(found) == list(range(8))


def as_image(grey):
    values = np.ascontiguousarray(grey).astype(np.float32)
    values /= 127.5
    return values - 1


def test_mirror_flips_only_horizontally():
    """Models of upright images must see skin at the top and shadows below lesions."""
    dataset = InMemoryDataset("u", 1)
    record = as_image(dataset[0].image)
    both = {record.tobytes(): "as it is", np.ascontiguousarray(record[:, ::-1]).tobytes(): "mirrored"}
    taken = take(loader(unlabeled=1, batches=(0, 4), augment="mirror"), 25)
    found = Counter(both[image.tobytes()] for batch, _ in taken for image in batch.images.numpy()[:, 0])
    assert set(found) == {"as it is", "mirrored"}
    assert 30 < found["mirrored"] < 70


def test_without_augmentation_records_are_unchanged():
    dataset = InMemoryDataset("l", 3)
    for batch, _ in take(loader(labeled=3, batches=(2, 1), augment="none"), 4):
        for row in range(2):
            record = dataset[int(batch.keys[row][1:])]
            np.testing.assert_array_equal(batch.images[row, 0].numpy(), as_image(record.image))
            np.testing.assert_array_equal(batch.masks[row, 0].numpy(), record.mask / 255)


def test_masks_of_unlabeled_records_are_not_loaded():
    """The unlabeled dataset has masks; only those of the labeled stream may be loaded."""
    (batch, _), *_ = take(loader(batches=(1, 3)), 1)
    assert batch.masks.shape[0] == 1
    (batch, _), *_ = take(loader(batches=(0, 3)), 1)
    assert batch.masks.shape == (0, 1, SIZE, SIZE)
    assert batch.keys[0].startswith("u")


def test_types_and_value_range():
    (batch, _), *_ = take(loader(labeled=30, batches=(20, 20)), 1)
    assert batch.images.dtype == batch.masks.dtype == torch.float32
    assert batch.offsets.dtype == torch.int64
    assert batch.images.min() >= -1
    assert batch.images.max() <= 1
    assert batch.images.min() < -0.9
    assert batch.images.max() > 0.9
    assert set(batch.masks.unique().tolist()) == {0.0, 1.0}


def test_offsets_stay_on_the_cpu_when_a_batch_is_moved():
    batch, _ = next(loader().batches(StreamOffsets()))
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert (batch.images.dtype, batch.masks.dtype) == (torch.uint8, torch.bool), "bytes are transferred"
    assert moved.images.dtype == moved.masks.dtype == torch.float32
    assert moved.images.device.type == moved.masks.device.type == "meta"
    assert moved.offsets.device.type == "cpu"
    assert moved.keys == batch.keys


def test_epochs_are_counted_in_the_labeled_stream_if_there_is_one():
    both = loader(0, 2, labeled=10, unlabeled=4, batches=(2, 2))
    assert both.epoch_of(StreamOffsets(5, 400)) == 0.5
    assert both.batches_for(1) == 5  # 10 samples in batches of 2
    assert both.batches_for(1.1) == 6
    assert both.batches_for(1.2) == 6
    unlabeled_only = loader(0, 2, unlabeled=4, batches=(0, 2))
    assert unlabeled_only.epoch_of(StreamOffsets(0, 6)) == 1.5
    assert unlabeled_only.batches_for(2) == 4


def test_steps_of_a_fraction_of_an_epoch_are_exact():
    assert 0.07 * 100 > 7
    assert loader(labeled=100, batches=(1, 0)).batches_for(0.07) == 7


def test_unlabeled_record_in_the_labeled_stream_is_reported():
    dataset = ConcatDataset([InMemoryDataset("l", 3), InMemoryDataset("n", 1, labeled=False)])
    stream = ImageTrainLoader(Stream(dataset, 4), None, image_size=SIZE, seed=0, ranks=Ranks(), workers=1)
    with pytest.raises(UserError, match="record 'n0' of the labeled stream has no mask"):
        take(stream, 1)


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "expected"),
    [
        (Stream(InMemoryDataset("l", 0), 1), None, "no labeled images"),
        (Stream(InMemoryDataset("l", 1), 1), Stream(InMemoryDataset("u", 0), 1), "no unlabeled images"),
        (None, None, "neither labeled nor unlabeled"),
        (None, Stream(InMemoryDataset("u", 4), 0), "batch size of the unlabeled stream is 0. Set it to 1 or more"),
    ],
)
def test_invalid_streams_are_rejected_at_construction(labeled, unlabeled, expected):
    with pytest.raises(UserError, match=expected):
        ImageTrainLoader(labeled, unlabeled, image_size=SIZE, seed=0, ranks=Ranks())


@few
@given(world=ranks, count=sizes, batch=batch_sizes)
def test_evaluation_loads_each_sample_exactly_once(world, count, batch):
    seen = []
    for rank in range(world):
        for loaded in evaluate(InMemoryDataset("l", count), batch, rank=rank, world=world):
            assert 1 <= len(loaded.keys) <= batch
            assert loaded.labeled == len(loaded.keys)
            assert loaded.keys == [f"l{i}" for i in loaded.offsets]
            assert all(index % world == rank for index in loaded.offsets.tolist())
            seen += loaded.keys
    assert sorted(seen) == sorted(f"l{i}" for i in range(count))


@pytest.mark.parametrize(("size", "batch"), [(1, 4), (7, 2), (8, 4), (9, 4), (2, 1)])
def test_ranks_in_step_have_equally_many_batches_and_repeat_single_images(size, batch):
    for world in (1, 2, 3, 5):
        by_rank = [evaluation_batches(size, batch, rank, world, in_step=True) for rank in range(world)]
        assert len({len(batches) for batches in by_rank}) == 1
        for rank, batches in enumerate(by_rank):
            once = evaluation_batches(size, batch, rank, world, in_step=False)
            assert [list(indices) for indices in batches[: len(once)]] == [list(indices) for indices in once]
            assert [len(indices) for indices in batches[len(once) :]] in ([], [1])
        seen = [index for batches in by_rank for indices in batches for index in indices]
        assert set(seen) == set(range(size))


def test_of_an_image_that_two_ranks_scored_the_first_result_counts():
    assert gather_by_index([(2, "c"), (0, "a"), (1, "b"), (0, "again")]) == ["a", "b", "c"]


@pytest.mark.parametrize("workers", [1, 2])
def test_evaluation_does_not_depend_on_the_number_of_workers(workers):
    def batches(workers):
        return [(batch, None) for batch in evaluate(InMemoryDataset("l", 9), 2, rank=1, world=2, workers=workers)]

    assert_same_batches(batches(workers), batches(0))


def test_evaluation_of_an_empty_dataset_is_rejected():
    with pytest.raises(UserError, match="no evaluation images"):
        EvalLoader(InMemoryDataset("l", 0), 2, SIZE, Ranks())


def test_evaluation_with_unlabeled_images_keeps_masks_aligned_with_images():
    mixed = ConcatDataset([InMemoryDataset("n", 1, labeled=False), InMemoryDataset("l", 2)])
    (batch,) = evaluate(mixed, 3)
    assert batch.keys == ["l0", "l1", "n0"]
    assert batch.offsets.tolist() == [1, 2, 0]
    for row in range(2):
        assert torch.equal(batch.masks[row] > 0, batch.images[row] > 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_number_of_shards(shard_folder, workers):
    def stream(dataset, rank, workers):
        settings = {"image_size": SIZE, "seed": 0, "workers": workers, "augment": "symmetries"}
        return ImageTrainLoader(Stream(dataset, 2), None, ranks=Ranks(rank, 3), **settings)

    for rank in range(3):
        from_shards = take(stream(shard_folder, rank, workers), 5)
        assert_same_batches(from_shards, take(stream(InMemoryDataset("l", 7), rank, workers=0), 5))


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_record_stops_the_loader_with_shard_and_key(shard_folder, workers):
    path = shard_folder.folder / shard_folder.records[3].shard
    content = path.read_bytes()
    png = content.index(b"IDAT", content.index(b"l3.png"))
    path.write_bytes(content[: png + 8] + b"\0\0\0\0" + content[png + 12 :])
    stream = ImageTrainLoader(Stream(shard_folder, 7), None, image_size=SIZE, seed=0, ranks=Ranks(), workers=workers)
    with pytest.raises(UserError, match=rf"{path.name}: record 'l3' is corrupt"):
        take(stream, 1)
