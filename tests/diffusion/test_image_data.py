"""Training and validation images of the generative stage."""

import numpy as np
from accelerate import Accelerator

from mgcc_dist.data.loader import StreamOffsets
from mgcc_dist.data.splits import make_split
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.images import ImageData


def image_data(shards, **config) -> ImageData:
    split = make_split(shards.records, seed=0, validation=6, labeled=9, grouped=True, name="split")
    return ImageData(DataConfig(image_size=32, workers=0, **config), shards, split)


def take(loader, steps):
    """Return (key, image) of every sample in the first `steps` batches."""
    batches = [batch for _, (batch, _) in zip(range(steps), loader.batches(StreamOffsets()), strict=False)]
    return [
        (key, image) for batch in batches for key, image in zip(batch.keys, batch.images[:, 0].numpy(), strict=True)
    ]


def test_training_never_sees_a_validation_image(phantom_shards):
    data, accelerator = image_data(phantom_shards), Accelerator(cpu=True)
    train = {key for key, _ in take(data.train_loader(6, 0, accelerator), 3)}
    val = {key for batch in data.val_loader(4, accelerator).batches() for key in batch.keys}
    evaluated = {key for batch in data.train_eval_loader(4, accelerator).batches() for key in batch.keys}
    assert (len(train), len(val)) == (18, 6)
    assert train == evaluated
    assert train | val == set(phantom_shards.keys())


def test_mirror_flips_horizontally_and_never_rotates(phantom_shards):
    """With `mirror` an image is either unchanged or flipped horizontally, each about half of the time."""
    seen = []
    for key, image in take(image_data(phantom_shards, mirror=True).train_loader(6, 0, Accelerator(cpu=True)), 12):
        original = phantom_shards[phantom_shards.index_of(key)].image
        same = [np.array_equal(image, candidate) for candidate in (original, original[:, ::-1])]
        assert sum(same) == 1
        seen.append(same[0])
    assert 0.25 < np.mean(seen) < 0.75


def test_images_are_not_augmented_by_default(phantom_shards):
    for key, image in take(image_data(phantom_shards).train_loader(6, 0, Accelerator(cpu=True)), 6):
        original = phantom_shards[phantom_shards.index_of(key)].image
        np.testing.assert_array_equal(image, original)


def test_examples_are_validation_images(phantom_shards):
    data = image_data(phantom_shards)
    val = np.concatenate([batch.to("cpu").images for batch in data.val_loader(4, Accelerator(cpu=True)).batches()])
    examples = data.val_examples(3).numpy()
    assert examples.shape == (3, 1, 32, 32)
    np.testing.assert_array_equal(examples, val[[0, 2, 5]])
