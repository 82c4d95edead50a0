"""Which images the generative stage sees."""

import numpy as np
from accelerate import Accelerator

from mgcc_dist.data.loader import StreamOffsets
from mgcc_dist.data.splits import make_split
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.images import ImageData


def images(shards, **config) -> ImageData:
    split = make_split(shards.records, seed=0, validation=6, labeled=9, grouped=True, name="split")
    return ImageData(DataConfig(image_size=32, workers=0, **config), shards, split)


def taken(loader, steps):
    """(key, image) of every sample of `steps` batches."""
    batches = [batch for _, (batch, _) in zip(range(steps), loader.batches(StreamOffsets()), strict=False)]
    return [
        (key, image) for batch in batches for key, image in zip(batch.keys, batch.images[:, 0].numpy(), strict=True)
    ]


def test_all_training_images_are_learned_and_no_held_out_one(phantom_shards):
    source, accelerator = images(phantom_shards), Accelerator(cpu=True)
    learned = {key for key, _ in taken(source.train_loader(6, 0, accelerator), 3)}
    held_out = {key for batch in source.val_loader(4, accelerator).batches() for key in batch.keys}
    measured = {key for batch in source.train_eval_loader(4, accelerator).batches() for key in batch.keys}
    assert (len(learned), len(held_out)) == (18, 6)
    assert learned == measured
    assert learned | held_out == set(phantom_shards.keys())


def test_mirrored_images_are_never_turned(phantom_shards):
    """With `mirror` an image comes as it is or with left and right exchanged, both often."""
    seen = []
    for key, image in taken(images(phantom_shards, mirror=True).train_loader(6, 0, Accelerator(cpu=True)), 12):
        original = phantom_shards[phantom_shards.index_of(key)].image
        same = [np.array_equal(image, candidate) for candidate in (original, original[:, ::-1])]
        assert sum(same) == 1
        seen.append(same[0])
    assert 0.25 < np.mean(seen) < 0.75


def test_images_come_as_they_are_by_default(phantom_shards):
    for key, image in taken(images(phantom_shards).train_loader(6, 0, Accelerator(cpu=True)), 6):
        original = phantom_shards[phantom_shards.index_of(key)].image
        np.testing.assert_array_equal(image, original)


def test_examples_are_held_out_images(phantom_shards):
    source = images(phantom_shards)
    held_out = np.concatenate(
        [batch.to("cpu").images for batch in source.val_loader(4, Accelerator(cpu=True)).batches()]
    )
    examples = source.val_examples(3).numpy()
    assert examples.shape == (3, 1, 32, 32)
    np.testing.assert_array_equal(examples, held_out[[0, 2, 5]])
