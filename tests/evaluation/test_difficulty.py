"""Cases are chosen by their image and ground truth."""

import numpy as np
import pytest

from mgcc_dist.evaluation.difficulty import Difficulty, choose, measure


def square(inside, outside=100, blur=0):
    """A 60x60 image with a square of 20x20 whose border is `blur` pixels wide, and its ground truth."""
    truth = np.zeros((60, 60), bool)
    truth[20:40, 20:40] = True
    offset = np.abs(np.arange(60) - 29.5) - 10  # distance from the border of the square, negative inside
    distance = np.maximum(offset[:, None], offset[None])
    share = np.clip(0.5 - distance / max(blur, 1e-9), 0, 1)
    return np.round(outside + share * (inside - outside)).astype(np.uint8), truth


def test_contrast_is_the_difference_between_inside_and_a_ring():
    assert measure("a", *square(40)).contrast == pytest.approx(60 / 255)
    assert measure("a", *square(160)).contrast == pytest.approx(60 / 255)  # brighter counts as much as darker
    assert measure("a", *square(40)).lesion_area == pytest.approx(400 / 3600)


def test_a_blurred_boundary_is_less_clear():
    assert measure("sharp", *square(40)).boundary > 2 * measure("blurred", *square(40, blur=12)).boundary > 0


def test_an_image_without_lesion_has_a_brightness_only():
    image = np.full((8, 8), 51, np.uint8)
    assert measure("a", image, np.zeros((8, 8), bool)) == Difficulty("a", 0, 0, 0, pytest.approx(0.2))


def test_each_image_is_chosen_once_by_the_first_rule_that_it_meets():
    images = [
        Difficulty("faint, unclear and small", 0.01, 0.01, 0.01, 0.5),
        Difficulty("unclear", 0.2, 0.5, 0.02, 0.5),
        Difficulty("large", 0.6, 0.5, 0.5, 0.5),
        Difficulty("small", 0.02, 0.5, 0.5, 0.5),
        Difficulty("other", 0.1, 0.5, 0.5, 0.5),
        *(
            Difficulty(f"normal {name}", 0, 0, 0, value)
            for name, value in (("dark", 0.1), ("bright", 0.9), ("mid", 0.4))
        ),
    ]
    assert choose(images) == [
        ("lowest contrast", "faint, unclear and small"),
        ("unclear boundary", "unclear"),
        ("largest lesion", "large"),
        ("smallest lesion", "small"),
        ("no lesion", "normal mid"),
    ]
    assert choose(images[:1]) == [("lowest contrast", "faint, unclear and small")]
