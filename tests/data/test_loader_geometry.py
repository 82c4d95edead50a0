"""The images and masks of a batch lie over each other, at every size and fit."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from in_memory_dataset import SIZE, InMemoryDataset
from torch.utils.data import ConcatDataset

from mgcc_dist.data.loader import EvalLoader, ImageTrainLoader, Ranks, Stream, StreamOffsets
from mgcc_dist.data.sample import Sample


class HalfWhiteImage:
    """One 60x90 image: black left half with a white speck, white right half, which is the mask."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        image = np.zeros((60, 90), np.uint8)
        image[:, 45:] = 255
        image[30, 20] = 255
        mask = np.zeros((60, 90), np.uint8)
        mask[:, 45:] = 255
        return Sample("half", image, mask, {})


@pytest.mark.parametrize("size", [30, 120])
def test_images_are_resized_with_antialiasing_and_masks_stay_binary(size):
    (batch,) = EvalLoader(HalfWhiteImage(), 1, size, Ranks()).batches()
    batch = batch.to("cpu")
    assert batch.images.shape == batch.masks.shape == (1, 1, size, size)
    assert set(batch.masks.unique().tolist()) == {0.0, 1.0}
    assert batch.masks.mean() == 0.5
    image = batch.images[0, 0]
    assert image[:, -size // 3 :].min() == 1
    # An antialiased filter keeps part of the speck when shrinking; nearest-neighbour interpolation may lose it.
    assert image[:, : size // 3].max() > -0.99
    if size == 30:
        assert image[:, : size // 3].max() < 0


class HalfWhiteImageUnderAMask(HalfWhiteImage):
    """The same image without the speck, 60x90; what is not seen of it under a crop is a sixth on each side."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return replace(sample, image=sample.mask.copy())


@pytest.mark.parametrize(("fit", "lesion"), [("stretch", 1 / 2), ("letterbox", 1 / 3), ("crop", 1 / 2)])
def test_image_and_mask_agree_under_every_fit_and_symmetry(fit, lesion):
    dataset = HalfWhiteImageUnderAMask()
    stream = ImageTrainLoader(
        Stream(dataset, 8), None, image_size=30, seed=0, ranks=Ranks(), augment="symmetries", fit=fit
    )
    with closing(stream.batches(StreamOffsets())) as batches:
        batch = next(batches)[0].to("cpu")
    assert torch.equal(batch.masks > 0, batch.images > 0)
    assert torch.allclose(batch.masks.mean(dim=(1, 2, 3)), torch.tensor(lesion))
    assert len(batch.masks.flatten(1).unique(dim=0)) > 1, "no symmetries"


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
def test_evaluation_keeps_masks_at_their_own_size_unless_stretched(fit):
    mixed = ConcatDataset([InMemoryDataset("n", 1, shape=(5, 7), labeled=False), InMemoryDataset("l", 2, shape=(6, 4))])
    (batch,) = EvalLoader(mixed, 3, SIZE, Ranks(), fit=fit).batches()
    own = [mixed[index].mask > 0 for index in (1, 2)]
    assert batch.masks.shape == (2, 1, SIZE, SIZE)
    assert len(batch.own_masks) == (0 if fit == "stretch" else 2)
    for found, expected in zip(batch.own_masks, own, strict=False):
        np.testing.assert_array_equal(found.numpy(), expected)
    assert all(mask.device.type == "meta" for mask in batch.to("meta").to("meta").own_masks)
