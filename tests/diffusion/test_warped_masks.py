"""Masks for synthetic images: new, in the frame, of the class's size, the same for any order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.sample import Sample
from mgcc_dist.diffusion import warped_masks
from mgcc_dist.diffusion.warped_masks import AREA_FACTOR, MAX_IOU, WarpedMasks

SIZE = 48


def ellipse(center, half_axes):
    rows, columns = np.mgrid[:SIZE, :SIZE]
    inside = ((rows - center[0]) / half_axes[0]) ** 2 + ((columns - center[1]) / half_axes[1]) ** 2 < 1
    return np.where(inside, 255, 0).astype(np.uint8)


def sample(name, mask):
    return Sample("k", mask, mask, {"class": name})


ellipses = st.builds(
    ellipse, st.tuples(st.floats(5, 43), st.floats(5, 43)), st.tuples(st.floats(3, 16), st.floats(3, 16))
)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(masks=st.lists(ellipses, min_size=1, max_size=6), seed=st.integers(0, 9), index=st.integers(0, 10**6))
def test_a_mask_is_no_training_mask_and_stays_in_the_frame(masks, seed, index):
    warped = WarpedMasks([sample("benign", mask) for mask in masks], SIZE)
    mask = warped.draw("benign", seed, index)
    assert (mask.dtype, mask.shape) == (np.uint8, (SIZE, SIZE))
    assert set(np.unique(mask)) == {0, 255}
    assert not any(edge.any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    for training in (view for each in masks for view in (each > 0, each[:, ::-1] > 0)):
        lesion = mask > 0
        assert (lesion & training).sum() / (lesion | training).sum() <= MAX_IOU
    sizes = [(each > 0).sum() for each in masks]
    assert min(sizes) / 2 / AREA_FACTOR < (mask > 0).sum() < 1.5 * max(sizes)
    np.testing.assert_array_equal(
        mask, WarpedMasks([sample("benign", each) for each in masks], SIZE).draw("benign", seed, index)
    )


def test_sizes_are_those_of_the_class_and_normal_images_stay_empty():
    small = [ellipse((20, 12 + 4 * i), (4, 5)) for i in range(5)]
    large = [ellipse((24, 16 + 4 * i), (12, 10)) for i in range(5)]
    normal = [np.zeros((SIZE, SIZE), np.uint8)] * 2
    labeled = {"benign": small, "malignant": large, "normal": normal}
    warped = WarpedMasks([sample(name, mask) for name, masks in labeled.items() for mask in masks], SIZE)
    assert warped.counts == {"benign": 5, "malignant": 5, "normal": 2}
    drawn = {name: [(warped.draw(name, 0, i) > 0).sum() for i in range(20)] for name in labeled}
    assert np.median(drawn["benign"]) == pytest.approx((small[0] > 0).sum(), rel=0.25)
    assert np.median(drawn["malignant"]) == pytest.approx((large[0] > 0).sum(), rel=0.25)
    assert not any(drawn["normal"])
    assert len({warped.draw("malignant", 0, i).tobytes() for i in range(20)}) == 20, "each index has its own mask"


def test_masks_are_drawn_again_until_they_differ_enough(monkeypatch):
    monkeypatch.setattr(warped_masks, "MAX_IOU", 0.3)
    small = [sample("benign", ellipse((20, 18), (5, 6))), sample("benign", ellipse((26, 30), (6, 5)))]
    warped = WarpedMasks(small, SIZE)
    assert max(warped.overlap(warped.draw("benign", 0, i) > 0) for i in range(10)) <= 0.3


def test_masks_that_leave_no_other_one_are_refused():
    full = np.full((SIZE, SIZE), 255, np.uint8)
    tiny = np.zeros((SIZE, SIZE), np.uint8)
    tiny[20, 20] = 255
    with pytest.raises(UserError, match=r"masks: no mask of class 'benign' that differs .* in 200 attempts"):
        WarpedMasks([sample("benign", tiny)], SIZE).draw("benign", 0, 0)
    WarpedMasks([sample("benign", full)], SIZE).draw("benign", 0, 0)  # shrunk into the frame
    with pytest.raises(UserError, match="masks: no training image has a mask"):
        WarpedMasks([], SIZE)
