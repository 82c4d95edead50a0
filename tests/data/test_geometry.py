"""Images become squares and come back: image and mask agree, and discs stay discs in the same place."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.geometry import boxes, fit_image, fit_mask, fit_sample, restore, restore_strips
from mgcc_dist.data.images import resize_image, resize_mask
from mgcc_dist.data.sample import Sample

FITS = ("stretch", "letterbox", "crop")
some = settings(deadline=None, derandomize=True, max_examples=40)
lengths = st.integers(40, 131)


def disc(height, width, row, column, radius):
    """A white disc on black, uint8 [H,W]."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.where((rows - row) ** 2 + (columns - column) ** 2 <= radius**2, 255, 0).astype(np.uint8)


def center_and_radii(mask):
    """Center (row, column) and radii along rows and columns of a filled ellipse, in pixels."""
    rows, columns = np.nonzero(mask)
    return (rows.mean() + 0.5, columns.mean() + 0.5), (2 * rows.std(), 2 * columns.std())


@some
@given(height=lengths, width=lengths, size=st.integers(33, 96), fit=st.sampled_from(FITS))
def test_a_disc_is_where_the_boxes_say_in_image_and_mask(height, width, size, fit):
    small = min(height, width)
    row, column, radius = height / 2 + small / 10, width / 2 - small / 12, small / 4
    picture = disc(height, width, row, column, radius)
    mask = fit_mask(picture, size, fit)
    image = fit_image(picture, size, fit)
    assert image.shape == mask.shape == (size, size)
    assert set(np.unique(mask)) == {0, 255}
    assert ((image > 127) != (mask > 0)).mean() < 0.01, "image and mask disagree"

    seen, shown = boxes((height, width), size, fit)
    scales = [(to.stop - to.start) / (there.stop - there.start) for there, to in zip(seen, shown, strict=True)]
    center, radii = center_and_radii(mask)
    for axis, place in enumerate((row, column)):
        expected = shown[axis].start + (place - seen[axis].start) * scales[axis]
        assert abs(center[axis] - expected) < 0.25
        assert abs(radii[axis] - radius * scales[axis]) < 0.6
    if fit != "stretch":
        assert abs(scales[0] / scales[1] - 1) < 1.5 / min(small, size * small / max(height, width)), "distorted"


@some
@given(height=lengths, width=lengths, size=st.integers(64, 128), fit=st.sampled_from(FITS))
def test_a_mask_comes_back_to_its_place_in_the_image(height, width, size, fit):
    small = min(height, width)
    picture = disc(height, width, height / 2, width / 2 + small / 10, small / 4)
    square = torch.from_numpy(fit_mask(picture, size, fit)).float() / 255
    back = restore(square, (height, width), fit).numpy()
    assert back.shape == picture.shape
    both, either = (back > 0.5) & (picture > 0), (back > 0.5) | (picture > 0)
    assert both.sum() / either.sum() > 0.9
    assert np.allclose(center_and_radii(back > 0.5)[0], center_and_radii(picture)[0], atol=0.6)


@some
@given(height=st.integers(1, 300), width=st.integers(1, 300), size=st.integers(1, 64), fit=st.sampled_from(FITS))
def test_boxes_are_centred_and_not_empty_for_any_proportions(height, width, size, fit):
    seen, shown = boxes((height, width), size, fit)
    for box, sides in ((seen, (height, width)), (shown, (size, size))):
        for part, side in zip(box, sides, strict=True):
            assert 0 <= part.start < part.stop <= side
            assert part.start == side - part.stop
    full = {"stretch": (True, True), "letterbox": (True, False), "crop": (False, True)}[fit]
    assert full[0] <= (seen == (slice(0, height), slice(0, width)))
    assert full[1] <= (shown == (slice(0, size), slice(0, size)))
    pixels = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    mirrored = fit_image(np.ascontiguousarray(pixels[:, ::-1]), size, fit)
    assert np.abs(fit_image(pixels, size, fit)[:, ::-1].astype(int) - mirrored).max() <= 1


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
@pytest.mark.parametrize("shape", [(50, 70), (70, 13), (20, 17), (32, 40)])
def test_strips_of_an_image_are_the_same_bits_as_the_complete_one(monkeypatch, shape, fit):
    monkeypatch.setattr("mgcc_dist.data.geometry.STRIP_PIXELS", 100)
    square = torch.rand(32, 32, generator=torch.Generator().manual_seed(0))
    image = torch.zeros(shape)
    strips = list(restore_strips(square, shape, fit))
    assert len(strips) > 1
    for box, values in strips:
        image[box] = values
    assert torch.equal(image, restore(square, shape, fit))


def test_an_image_of_one_column_has_the_values_of_its_rows():
    square = torch.arange(4.0).repeat_interleave(8)[:, None].expand(32, 32)
    column = restore(square, (8, 1), "stretch")[:, 0]
    assert column.tolist() == pytest.approx(torch.arange(4.0).repeat_interleave(2).tolist(), abs=0.2)


@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (33, 33)])
def test_stretch_is_a_plain_resize(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mask = np.where(pixels > 99, 255, 0).astype(np.uint8)
    np.testing.assert_array_equal(fit_image(pixels, 33, "stretch"), resize_image(pixels, 33, 33))
    np.testing.assert_array_equal(fit_mask(mask, 33, "stretch"), resize_mask(mask, 33, 33))


def test_the_released_fit_does_not_antialias_and_takes_the_nearest_pixel_of_masks():
    """One white line of an image four times as large as the square lies between the sampling points, so it is lost."""
    picture = np.zeros((64, 128), np.uint8)
    picture[16] = 255
    assert fit_image(picture, 16, "stretch").max() > 30
    assert fit_image(picture, 16, "released").max() == 0
    assert (fit_mask(picture, 16, "released")[4] == 255).all()
    ramp = np.tile(np.arange(64, dtype=np.uint8)[:, None], (1, 32))
    # Bilinear between pixels 4 i + 1 and 4 i + 2, rounded to even; the nearest pixel is the first of each four.
    np.testing.assert_array_equal(fit_image(ramp, 16, "released")[:, 0], np.rint(np.arange(16) * 4 + 1.5))
    np.testing.assert_array_equal(fit_mask(ramp, 16, "released")[:, 0], np.arange(16) * 4)
    np.testing.assert_array_equal(
        restore(torch.eye(16), (64, 32), "released").numpy(), restore(torch.eye(16), (64, 32), "stretch").numpy()
    )


def test_letterbox_pads_with_black_and_crop_cuts_the_ends_off():
    white = np.full((40, 80), 255, np.uint8)
    padded = fit_image(white, 20, "letterbox")
    assert (padded[5:15] == 255).all()
    assert not padded[:5].any()
    assert not padded[15:].any()
    white[:, :20] = white[:, 60:] = 0
    assert (fit_image(white, 20, "crop") == 255).all()
    assert restore(torch.ones(20, 20), (40, 80), "crop").sum() == 40 * 40


def test_a_square_image_is_the_same_under_every_fit():
    pixels = np.random.default_rng(0).integers(0, 256, (47, 47), dtype=np.uint8)
    assert len({fit_image(pixels, 20, fit).tobytes() for fit in FITS}) == 1


def test_shards_that_were_stretched_cannot_keep_proportions():
    square = np.zeros((64, 64), np.uint8)
    stretched = Sample("a", square, square, {"original_size": [80, 60]})
    assert fit_sample(stretched, 32, "stretch").image.shape == (32, 32)
    with pytest.raises(UserError, match=r"data.fit: crop keeps proportions, but record 'a' is stored as 64x64 and its"):
        fit_sample(stretched, 32, "crop")
    fit_sample(Sample("b", square, None, {"original_size": [60, 60]}), 32, "crop")
