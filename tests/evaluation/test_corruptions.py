"""Corruptions are a function of seed, image and name, grow with their strength, and keep black images black."""

import numpy as np
import pytest

from mgcc_dist.data.phantom import draw
from mgcc_dist.evaluation.corruptions import CORRUPTIONS, STRENGTHS, corrupt

KEYS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def images():
    return np.stack([draw(0, index, 64).image for index in range(len(KEYS))])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_in_any_batch_and_differently_by_seed(images, name):
    together = corrupt(images, KEYS, name, 4, seed=1)
    assert together.dtype == np.uint8
    assert together.shape == images.shape
    for index in (2, 0):
        alone = corrupt(images[[index]], [KEYS[index]], name, 4, seed=1)
        np.testing.assert_array_equal(alone[0], together[index])
    if name in ("speckle", "shadow"):
        assert (together != corrupt(images, KEYS, name, 4, seed=2)).any()
        assert (together[0] != corrupt(images[[0]], ["z"], name, 4, seed=1)[0]).any()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_strength_changes_the_images_more(images, name):
    assert len(CORRUPTIONS[name]) == STRENGTHS
    changes = [np.abs(corrupt(images, KEYS, name, s, 0).astype(int) - images).mean() for s in range(1, STRENGTHS + 1)]
    assert changes[0] > 0
    assert changes == sorted(changes)
    assert len(set(changes)) == STRENGTHS


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_black_images_stay_black(name):
    black = np.zeros((2, 32, 32), np.uint8)
    assert corrupt(black, KEYS[:2], name, STRENGTHS, 0).max() <= (12 if name == "jpeg" else 0)  # its coarsest steps


def test_a_shadow_darkens_a_part_below_its_top_and_nothing_else():
    grey = np.full((1, 100, 100), 200, np.uint8)
    (shaded,) = corrupt(grey, ["a"], "shadow", STRENGTHS, 0)
    assert (shaded[:10] == 200).all()
    assert (shaded[-1] == 0).any()
    assert 0.05 < (shaded < 190).mean() < 0.4
