import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import write_png_of_16_bits
from PIL import Image

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.mask_summary import MaskSummary, describe_masks
from mgcc_dist.data.masks import MaskFacts, read_mask


@st.composite
def lesions(draw):
    """A mask of 64x80 with two ellipses: bool."""
    y, x = np.mgrid[:64, :80] + 0.5
    lesion = np.zeros((64, 80), np.bool_)
    for _ in range(2):
        centre, axes = (
            draw(st.tuples(st.integers(20, 60), st.integers(20, 44))),
            draw(st.tuples(*[st.integers(6, 16)] * 2)),
        )
        lesion |= ((x - centre[0]) / axes[0]) ** 2 + ((y - centre[1]) / axes[1]) ** 2 < 1
    return lesion


LESION = np.zeros((60, 80), np.bool_)
LESION[15:44, 20:55] = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("masks")


def encode(array, suffix, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, suffix, **options)
    return buffer.getvalue()


def save(path, image):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    return path


def assert_reads(path, lesion, **facts):
    mask, found = read_mask(path)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, np.where(lesion, 255, 0))
    assert {name: getattr(found, name) for name in facts} == facts


@settings(max_examples=60, deadline=None)
@given(
    lesion=lesions(),
    values=st.tuples(st.integers(0, 65535), st.integers(0, 65535)).filter(lambda pair: pair[0] < pair[1]),
    kind=st.sampled_from(["png", "tif", "bmp", "rgb"]),
)
def test_two_values_are_read_exactly_whatever_they_are(folder, lesion, values, kind):
    deep = values[1] > 255
    if deep and kind == "bmp":
        return
    pixels = np.where(lesion, values[1], values[0]).astype(np.uint16 if deep else np.uint8)
    if kind != "rgb":
        path = save(folder / f"x.{kind}", pixels)
    elif deep:
        path = write_png_of_16_bits(folder / "x.png", np.stack([pixels] * 3, axis=2))
    else:
        path = save(folder / "x.png", np.stack([pixels] * 3, axis=2))
    assert_reads(path, lesion, values=values, ambiguous=None)


@settings(max_examples=60, deadline=None)
@given(
    lesion=lesions(), quality=st.integers(50, 100), suffix=st.sampled_from(["jpg", "png", "bmp"]), again=st.booleans()
)
def test_jpeg_masks_keep_their_lesion_under_any_suffix(folder, lesion, quality, suffix, again):
    content = encode(np.where(lesion, 255, 0).astype(np.uint8), "JPEG", quality=quality)
    path = folder / f"x.{suffix}"
    if again:  # decoded and saved without loss
        path = save(folder / "x.png", np.asarray(Image.open(io.BytesIO(content))))
    else:
        path.write_bytes(content)
    mask, _ = read_mask(path)
    assert ((mask > 0) != lesion).sum() <= 0.005 * lesion.sum()


@settings(max_examples=40, deadline=None)
@given(
    lesion=lesions(), factor=st.integers(2, 8), resample=st.sampled_from([Image.BILINEAR, Image.BICUBIC, Image.LANCZOS])
)
def test_smoothly_enlarged_masks_keep_their_area(folder, lesion, factor, resample):
    large = Image.fromarray(np.where(lesion, 255, 0).astype(np.uint8)).resize((80 * factor, 64 * factor), resample)
    mask, facts = read_mask(save(folder / "x.png", large))
    assert abs((mask > 0).sum() / factor**2 / lesion.sum() - 1) < 0.03
    assert facts.ambiguous > 0


@settings(max_examples=60, deadline=None)
@given(
    lesion=lesions(), values=st.lists(st.integers(0, 255), min_size=3, max_size=3, unique=True), side=st.integers(3, 9)
)
def test_a_third_label_is_an_error_unless_labels_are_selected(folder, lesion, values, side):
    low, middle, high = sorted(values)
    if min(middle - low, high - middle) < 0.15 * (high - low):
        return  # as close as artefacts are
    main = values[:2]  # the third label lies below, between or above these
    pixels = np.where(lesion, max(main), min(main)).astype(np.uint8)
    pixels[5 : 5 + side, 60 : 60 + side] = values[2]
    path = save(folder / "x.png", pixels)
    with pytest.raises(BadFile, match=f"x.png: has 3 values, not two: {low}, {middle}, {high}. Pass --label-values"):
        read_mask(path)
    for chosen in ([middle], [high], [middle, high]):
        np.testing.assert_array_equal(read_mask(path, chosen)[0] > 0, np.isin(pixels, chosen))


def test_an_image_in_the_place_of_a_mask_is_an_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)
    with pytest.raises(
        BadFile, match=r"x\.png: has [5-9]\d% of its pixels close to neither of two values\. It looks like an image"
    ):
        read_mask(save(tmp_path / "x.png", noise))


def test_label_numbers_are_an_error_even_without_an_area(tmp_path):
    for levels in ([0, 1, 2], [1, 2, 3, 4, 9]):
        with pytest.raises(BadFile, match="Pass --label-values"):
            read_mask(save(tmp_path / "x.png", np.array([levels], np.uint8)))


@pytest.mark.parametrize(
    ("background", "lesion"),
    [
        ((0, 0, 0), (255, 0, 0)),
        ((0, 0, 0), (0, 0, 1)),
        ((255, 255, 255), (255, 0, 0)),
        ((128, 128, 128), (0, 200, 0)),
        ((0, 0, 0), (255, 255, 255)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "jpeg"])
def test_coloured_lesions_are_read_on_any_background(tmp_path, background, lesion, mode):
    pixels = np.where(LESION[:, :, None], np.uint8(lesion), np.uint8(background))
    path = tmp_path / "x.png"
    if mode == "P":
        image = Image.fromarray(LESION.astype(np.uint8)).convert("P")
        image.putpalette([*background, *lesion])
        image.save(path)
    elif mode == "jpeg":
        if max(lesion) < 200:
            pytest.skip("JPEG does not keep it")
        path.write_bytes(encode(pixels, "JPEG", quality=95, subsampling=0))
    else:
        Image.fromarray(pixels).convert(mode).save(path)
    assert_reads(path, LESION)


def test_palette_mask_without_a_lesion_is_empty_on_a_white_background(tmp_path):
    image = Image.new("P", (9, 7), 0)
    image.putpalette([255, 255, 255, 255, 0, 0])
    assert_reads(save(tmp_path / "x.png", image), np.zeros((7, 9), np.bool_))


def test_three_colours_are_an_error(tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[5:15, 5:15] = (255, 0, 0)
    pixels[20:30, 20:30] = (0, 255, 0)
    with pytest.raises(BadFile, match=r"has 3 colours\. Save it as a grey image"):
        read_mask(save(tmp_path / "x.png", pixels))


@pytest.mark.parametrize("colour", [0, 90, 255])
def test_mask_in_the_opacity_is_read(tmp_path, colour):
    opacity = np.where(LESION, 255, 0).astype(np.uint8)
    pixels = np.dstack([np.full_like(opacity, colour)] * 3 + [opacity])
    assert_reads(save(tmp_path / "x.png", pixels), LESION, from_opacity=True)
    assert_reads(save(tmp_path / "y.png", Image.fromarray(pixels).convert("LA")), LESION, from_opacity=True)


def test_transparent_background_over_an_opaque_lesion_of_two_colours_is_black(tmp_path):
    pixels = np.dstack([np.where(LESION, 255, 0).astype(np.uint8)] * 3 + [np.full(LESION.shape, 255, np.uint8)])
    pixels[:5, :, 3] = 0
    assert_reads(save(tmp_path / "x.png", pixels), LESION, from_opacity=False)


def test_16_bit_colour_of_0_and_255_is_not_empty(tmp_path):
    pixels = np.dstack([np.where(LESION, 255, 0)] * 3)
    assert_reads(write_png_of_16_bits(tmp_path / "x.png", pixels), LESION)


def test_constant_masks_are_empty_if_black_and_full_otherwise(tmp_path):
    for value, area in ((0, 0), (1, 12), (255, 12)):
        assert (read_mask(save(tmp_path / "x.png", np.full((3, 4), value, np.uint8)))[0] > 0).sum() == area


def test_float_masks_are_read_and_nan_is_an_error(tmp_path):
    values = LESION.astype(np.float32)
    assert_reads(save(tmp_path / "x.tif", values), LESION)
    values[3, 3] = np.nan
    with pytest.raises(BadFile, match="not finite"):
        read_mask(save(tmp_path / "x.tif", values))


def test_summary_counts_and_names_suspicious_masks():
    summary = MaskSummary()
    quarter = np.zeros((10, 10), np.uint8)
    quarter[:5, :5] = 255
    exact = [MaskFacts((0.0, 255.0))]
    summary.add("quarter", quarter, quarter, exact)
    summary.add("tiny", quarter // 255 * np.eye(10, dtype=np.uint8) * 255, np.zeros((2, 2), np.uint8), exact)
    summary.add("grey", quarter, quarter, [MaskFacts((), 10)])
    summary.add("alpha", quarter, quarter, [MaskFacts((0.0, 1.0), None, True)])
    summary.add("empty", quarter * 0, quarter * 0, [MaskFacts()])
    summary.add("full", quarter * 0 + 255, quarter * 0 + 255, [MaskFacts()])
    inverted = np.full((10, 10), 255, np.uint8)
    inverted[0, :9] = 0
    summary.add("inverted", inverted, inverted, exact)
    summary.add("unlabeled", None, None, [])
    counts, notes = describe_masks(summary.to_index())
    expected = "7 masks: 1 empty, 1 full, 1 more than 90% lesion, 1 ambiguous, median lesion area 25.00% of the image"
    assert counts == expected
    assert [note.rpartition(": ")[2] for note in notes[:5]] == [
        f"'{k}'" for k in ("full", "inverted", "grey", "alpha", "tiny")
    ]
    assert "10.00% of their area is close to neither" in notes[2]
    assert "(1 in 1 files, 255 in 3 files)" in notes[5]
