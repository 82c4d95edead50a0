"""The augmentation `ultrasound`: image and mask stay together, views are reproducible, nothing leaves the device."""

from itertools import islice

import numpy as np
import pytest
import torch
from in_memory_dataset import InMemoryDataset

from mgcc_dist.common.distributed import seed_step
from mgcc_dist.data import ultrasound
from mgcc_dist.data.loader import ImageTrainLoader, Ranks, Stream, StreamOffsets
from mgcc_dist.data.phantom import draw
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.ultrasound import strong_view, weak_view

SIZE = 48


@pytest.fixture(scope="module")
def discs():
    """32 equal images [32,1,48,48] in [-1,1]: a white disc off the middle, which is also the mask."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    disc = torch.from_numpy((rows - 18) ** 2 + (columns - 26) ** 2 <= 8**2).float()
    return disc.expand(32, 1, SIZE, SIZE) * 2 - 1


@pytest.fixture(scope="module")
def phantoms():
    pixels = np.stack([draw(seed=0, index=i, size=SIZE).image for i in range(8)])
    return torch.from_numpy(pixels)[:, None].float() / 127.5 - 1


def seeded(seed, function, *words):
    torch.manual_seed(seed)
    return function(*words)


def test_a_weak_view_moves_image_and_mask_together(discs):
    images, masks = seeded(0, weak_view, discs, (discs > 0).float())
    assert torch.equal(masks.unique(), torch.tensor([0.0, 1.0]))
    agreement = ((images > 0) == (masks > 0)).float().mean(dim=(1, 2, 3))
    assert agreement.min() > 0.995
    assert len(masks.flatten(1).unique(dim=0)) > 20, "the views are equal"
    areas = masks.mean(dim=(1, 2, 3)) / (discs > 0).float().mean()
    assert areas.min() < 0.8
    assert areas.max() > 1.25


@pytest.mark.parametrize("name", list(ultrasound.LARGEST))
def test_each_deformation_is_applied_to_some_images_and_not_to_others(discs, monkeypatch, name):
    monkeypatch.setattr(
        ultrasound, "LARGEST", dict.fromkeys(ultrasound.LARGEST, 0.0) | {name: ultrasound.LARGEST[name]}
    )
    images, _ = seeded(0, weak_view, discs, (discs > 0).float())
    changed = ((images - discs).abs() > 1e-4).flatten(1).any(dim=1)
    assert 6 <= changed.sum() <= 26


def test_without_deformation_the_weak_view_is_the_image(phantoms, monkeypatch):
    monkeypatch.setattr(ultrasound, "LARGEST", dict.fromkeys(ultrasound.LARGEST, 0.0))
    masks = (phantoms[:5] > 0).float()
    images, same = weak_view(phantoms, masks)
    torch.testing.assert_close(images, phantoms, rtol=0, atol=1e-4)
    assert torch.equal(same, masks)


@pytest.mark.parametrize("angle", [10, -10])
def test_a_rotation_keeps_lengths_and_a_scale_enlarges(discs, monkeypatch, angle):
    """A point right of the middle moves on a circle; the disc's area changes by the square of the scale."""
    monkeypatch.setattr(ultrasound, "_sometimes", lambda share, values: values)
    drawn = iter([np.log(1.2), 0.0, 0.0, np.radians(angle), 0.0, 0.0])
    monkeypatch.setattr(ultrasound, "_between", lambda like, low, high: torch.full_like(like, next(drawn)))
    _, masks = weak_view(discs[:1], (discs[:1] > 0).float())
    assert masks.sum() / (discs[:1] > 0).sum() == pytest.approx(1.2**2, abs=0.05)
    before, after = (torch.argwhere(mask[0, 0] > 0).float().mean(dim=0) - (SIZE - 1) / 2 for mask in (discs[:1], masks))
    assert after.norm() / before.norm() == pytest.approx(1.2, abs=0.03)
    turned = torch.atan2(after[0], after[1]) - torch.atan2(before[0], before[1])
    assert abs(turned.item()) == pytest.approx(np.radians(10), abs=0.03)


def test_a_strong_view_changes_the_look_and_not_the_place(phantoms):
    changed = seeded(0, strong_view, phantoms)
    assert changed.shape == phantoms.shape
    assert changed.min() >= -1
    assert changed.max() <= 1
    for before, after in zip(phantoms, changed, strict=True):
        assert (before - after).abs().mean() > 0.002
        correlation = torch.corrcoef(torch.stack((before.flatten(), after.flatten())))[0, 1]
        assert correlation > 0.6


@pytest.mark.parametrize("name", ["speckle", "shadow", "blur", "time_gain", "gain", "gamma", "jpeg"])
def test_each_effect_is_applied_to_some_images_and_not_to_others(phantoms, monkeypatch, name):
    for other in {"speckle", "shadow", "blur", "time_gain", "gain", "gamma", "jpeg"} - {name}:
        monkeypatch.setattr(ultrasound.effects, other, lambda images, *words, **more: images)
    images = phantoms.repeat(4, 1, 1, 1)
    changed = ((seeded(0, strong_view, images) - images).abs() > 1e-4).flatten(1).any(dim=1)
    assert 3 <= changed.sum() <= 25


def test_views_are_a_function_of_the_seed_and_differ_between_calls(phantoms):
    first = seeded(5, strong_view, phantoms)
    second = strong_view(phantoms)
    assert torch.equal(first, seeded(5, strong_view, phantoms))
    assert not torch.equal(first, second)


def test_views_read_nothing_from_the_device(phantoms):
    """On the meta device there are no values to read."""
    images, masks = weak_view(phantoms.to("meta"), phantoms[:3].to("meta"))
    assert strong_view(images).device.type == masks.device.type == "meta"


def test_a_batch_without_labels_is_augmented(phantoms):
    images, masks = weak_view(phantoms, phantoms[:0])
    assert images.shape == phantoms.shape
    assert masks.shape == (0, 1, SIZE, SIZE)


class Phantoms:
    def __len__(self):
        return 6

    def __getitem__(self, index):
        phantom = draw(seed=0, index=index, size=SIZE)
        return Sample(f"p{index}", phantom.image, phantom.mask, {})


def loader(rank=0, world=1, workers=0, augment="ultrasound"):
    settings = {"image_size": SIZE, "seed": 3, "ranks": Ranks(rank, world), "workers": workers, "augment": augment}
    return ImageTrainLoader(Stream(Phantoms(), 2), Stream(Phantoms(), 2), **settings)


def batches(stream, steps, start=None):
    """Batches as the training loop moves them to the device: the generators are seeded per step and rank."""
    for step, (batch, _) in islice(enumerate(stream.batches(start or StreamOffsets())), steps):
        seed_step(0, step, stream.rank)
        yield batch.to("cpu")


def test_batches_are_augmented_on_the_device_whatever_the_workers():
    plain, own, with_worker = (
        list(batches(loader(**words), 2)) for words in ({"augment": "mirror"}, {}, {"workers": 1})
    )
    for before, after, other in zip(plain, own, with_worker, strict=True):
        assert before.keys == after.keys
        assert not torch.equal(before.images, after.images)
        assert torch.equal(after.images, other.images)
        assert torch.equal(after.masks, other.masks)


def test_two_ranks_see_the_views_that_one_rank_sees_with_two_micro_batches():
    """As in train/loop.py, which numbers the batches of a step over ranks and micro-steps."""
    two = [next(batches(loader(rank, 2), 1)) for rank in range(2)]
    one = []
    for micro, (batch, _) in islice(enumerate(loader().batches(StreamOffsets())), 2):
        seed_step(0, 0, micro)
        one.append(batch.to("cpu"))
    for ours, expected in zip(two, one, strict=True):
        assert ours.keys == expected.keys
        assert torch.equal(ours.images, expected.images)


def test_a_method_gets_weak_images_for_targets_and_makes_further_strong_views():
    """What FixMatch does: the target of the weak view is in place on each strong view."""
    batch = next(batches(loader(), 1))
    weak = batch.weak_images[batch.labeled :]
    assert not torch.equal(weak, batch.images[batch.labeled :])
    first, second = strong_view(weak), strong_view(weak)
    assert not torch.equal(first, second)
    for strong in (first, second, batch.images[batch.labeled :]):
        for one, other in zip(weak, strong, strict=True):
            assert torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1] > 0.6
    moved = batch.to("meta")
    assert moved.weak_images.device.type == "meta"


@pytest.mark.parametrize("augment", ["symmetries", "mirror", "none"])
def test_images_of_other_augmentations_are_their_own_weak_views(augment):
    batch = next(batches(loader(augment=augment), 1))
    assert batch.weak_images is batch.images


def test_unlabeled_images_only():
    stream = ImageTrainLoader(
        None, Stream(InMemoryDataset("u", 4), 2), image_size=16, seed=0, ranks=Ranks(), augment="ultrasound"
    )
    batch = next(batches(stream, 1))
    assert batch.images.shape == (2, 1, 16, 16)
    assert batch.masks.shape == (0, 1, 16, 16)
