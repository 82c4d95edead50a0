from collections import Counter

import numpy as np
import pytest

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.phantom import CLASSES, SHARES, draw


@pytest.fixture(scope="module")
def phantoms():
    return [draw(seed=3, index=i, size=64) for i in range(300)]


def of_class(phantoms, category):
    return [phantom for phantom in phantoms if phantom.category == category]


def ring(mask: np.ndarray, width: int = 5) -> np.ndarray:
    """The pixels within about `width` of a mask."""
    grown = mask > 0
    for _ in range(width):
        grown = grown | np.roll(grown, 1, 0) | np.roll(grown, -1, 0) | np.roll(grown, 1, 1) | np.roll(grown, -1, 1)
    return grown & (mask == 0)


def test_a_phantom_depends_only_on_seed_and_index(phantoms):
    again = draw(seed=3, index=7, size=64)
    np.testing.assert_array_equal(again.image, phantoms[7].image)
    np.testing.assert_array_equal(again.mask, phantoms[7].mask)
    assert again.category == phantoms[7].category
    assert len({phantom.image.tobytes() for phantom in phantoms}) == len(phantoms)
    assert (draw(seed=4, index=7, size=64).image != again.image).any()


def test_arrays_have_the_format_of_a_sample(phantoms):
    for phantom in phantoms:
        assert phantom.image.dtype == phantom.mask.dtype == np.uint8
        assert phantom.image.shape == phantom.mask.shape == (64, 64)
        assert set(np.unique(phantom.mask)) <= {0, 255}


def test_classes_have_busi_s_proportions(phantoms):
    counts = Counter(phantom.category for phantom in phantoms)
    for category, share in zip(CLASSES, SHARES, strict=True):
        assert abs(counts[category] / len(phantoms) - share) < 0.08


def test_all_but_normals_have_a_lesion_of_plausible_size(phantoms):
    for phantom in phantoms:
        area = (phantom.mask > 0).mean()
        assert area == 0 if phantom.category == "normal" else 0.003 < area < 0.4


@pytest.mark.parametrize("size", [16, 50, 128])
def test_the_same_scene_is_drawn_at_any_size(size, phantoms):
    for index in range(10):
        phantom = draw(seed=3, index=index, size=size)
        assert phantom.category == phantoms[index].category
        assert phantom.image.shape == (size, size)
        assert abs((phantom.mask > 0).mean() - (phantoms[index].mask > 0).mean()) < 1.5 / size


def test_too_small_sizes_are_rejected():
    with pytest.raises(UserError, match="at least 16 pixels"):
        draw(seed=0, index=0, size=15)


def test_lesions_are_darker_than_their_surroundings_and_malignant_ones_darkest(phantoms):
    def contrast(category):
        drops = [
            phantom.image[ring(phantom.mask)].mean() - phantom.image[phantom.mask > 0].mean()
            for phantom in of_class(phantoms, category)
        ]
        return np.array(drops)

    benign, malignant = contrast("benign"), contrast("malignant")
    assert (benign > 0).mean() > 0.9
    assert (malignant > 0).mean() > 0.9
    assert malignant.mean() > benign.mean() + 3


def test_malignant_outlines_are_more_irregular_and_taller(phantoms):
    def irregularity(mask):
        mask = np.pad(mask > 0, 1)
        edge = sum((mask ^ np.roll(mask, 1, axis)).sum() for axis in (0, 1))
        return edge / np.sqrt(mask.sum())

    def height_to_width(mask):
        rows, columns = np.nonzero(mask)
        return np.ptp(rows) / np.ptp(columns)

    for measure in (irregularity, height_to_width):
        benign, malignant = (
            np.mean([measure(phantom.mask) for phantom in of_class(phantoms, category)])
            for category in ("benign", "malignant")
        )
        assert malignant > 1.1 * benign


def test_only_malignant_lesions_cast_a_shadow(phantoms):
    def shadow(phantom):
        """How much darker the image is directly below the lesion than elsewhere at that depth."""
        rows, columns = np.nonzero(phantom.mask)
        below = phantom.image[rows.max() + 2 : rows.max() + 12]
        under = below[:, int(np.percentile(columns, 30)) : int(np.percentile(columns, 70)) + 1]
        return below.mean() - under.mean()

    with np.errstate(all="ignore"):
        benign, malignant = (
            np.nanmean([shadow(phantom) for phantom in of_class(phantoms, category)])
            for category in ("benign", "malignant")
        )
    assert malignant > 5
    assert benign < malignant / 2


def test_thresholding_does_not_find_the_lesions_even_per_image(phantoms):
    best = []
    for phantom in phantoms:
        lesion = phantom.mask > 0
        if lesion.any():
            dark = [phantom.image < threshold for threshold in range(5, 150, 5)]
            best.append(max((lesion & predicted).sum() / (lesion | predicted).sum() for predicted in dark))
    assert np.mean(best) < 0.3


def test_speckle_is_more_correlated_across_the_beam_than_along_it():
    along, across = [], []
    for index in range(20):
        image = draw(seed=5, index=index, size=192).image.astype(float)
        fine = image - (np.roll(image, 2, 0) + np.roll(image, -2, 0) + np.roll(image, 2, 1) + np.roll(image, -2, 1)) / 4
        centre = fine[4:-4, 4:-4]
        along.append((centre * fine[5:-3, 4:-4]).mean() / (centre**2).mean())
        across.append((centre * fine[4:-4, 5:-3]).mean() / (centre**2).mean())
    assert np.mean(across) > np.mean(along) + 0.1
    assert np.mean(across) > 0.4
