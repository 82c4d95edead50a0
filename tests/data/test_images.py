import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import write_png_of_16_bits
from PIL import Image

from mgcc_dist.data.datasets import ResizedDataset
from mgcc_dist.data.images import BadFile, bits_used, read_grey, resize_image, resize_mask
from mgcc_dist.data.sample import Sample

GREY = np.random.default_rng(0).integers(0, 256, (12, 17), dtype=np.uint8)


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_values_are_exact_in_every_lossless_format(tmp_path, suffix, mode):
    read = read_grey(save(tmp_path / f"x.{suffix}", GREY, mode))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, GREY)


def test_jpeg_is_read(tmp_path):
    smooth = np.tile(np.arange(0, 240, 15, dtype=np.uint8), (16, 1))
    assert np.abs(read_grey(save(tmp_path / "x.JPEG", smooth)).astype(int) - smooth).max() < 8


@pytest.mark.parametrize("mode", ["P", "PA", "LA", "RGBA", "1", "CMYK"])
def test_palettes_alpha_and_bits_become_grey(tmp_path, mode):
    array = np.where(GREY > 127, 255, 0).astype(np.uint8)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "PA") else "x.png")
    np.testing.assert_array_equal(read_grey(save(path, array, mode)), array)


def test_colours_become_luminance(tmp_path):
    colour = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)
    np.testing.assert_array_equal(read_grey(save(tmp_path / "x.png", colour)), [[76, 150, 29]])


def test_transparency_is_composited_onto_black(tmp_path):
    pixels = np.array([[[200, 200, 200, 255], [200, 200, 200, 0]]], dtype=np.uint8)
    np.testing.assert_array_equal(read_grey(save(tmp_path / "x.png", pixels)), [[200, 0]])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_strips_of_a_large_image_are_the_same_as_the_complete_one(tmp_path, monkeypatch, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 30, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "a.png")
    complete = read_grey(tmp_path / "a.png")
    monkeypatch.setattr("mgcc_dist.data.images.STRIP_PIXELS", 200)
    np.testing.assert_array_equal(read_grey(tmp_path / "a.png"), complete)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("bits", "top"), [(8, 255), (12, 4095), (16, 65535)])
def test_12_and_16_bit_pixels_are_scaled_to_the_8_bit_range(tmp_path, suffix, bits, top):
    deep = np.array([[0, top // 2, top]], dtype=np.uint16)
    np.testing.assert_array_equal(read_grey(save(tmp_path / f"x.{suffix}", deep)), [[0, 127, 255]])


def test_given_bits_scale_all_images_alike_and_larger_pixels_are_an_error(tmp_path):
    path = save(tmp_path / "x.png", np.array([[0, 100, 1023]], dtype=np.uint16))
    assert read_grey(path).tolist() == [[0, 25, 255]]
    assert read_grey(path, 12).tolist() == [[0, 6, 63]]
    with pytest.raises(BadFile, match=r"x\.png: has pixels up to 1023, more than 9 bits hold"):
        read_grey(path, 9)


def test_bits_used_are_those_of_the_brightest_16_bit_image(tmp_path):
    paths = [save(tmp_path / f"{top}.png", np.array([[0, top]], dtype=np.uint16)) for top in (200, 4095, 4096, 900)]
    paths.append(write_png_of_16_bits(tmp_path / "colour.png", np.array([[[0, 0, 0], [1000] * 3]])))
    assert [bits_used([path]) for path in paths] == [8, 12, 14, 10, 10]
    (tmp_path / "damaged.png").write_bytes(b"no image")
    assert bits_used([*paths, tmp_path / "damaged.png", save(tmp_path / "8.png", GREY)]) == 14
    assert bits_used([tmp_path / "8.png"]) is None


@pytest.mark.parametrize("array", [np.array([[0.5, 2.0]], dtype=np.float32), np.array([[0, 2**20]], dtype=np.int32)])
def test_32_bit_pixels_are_an_error_that_names_the_file(tmp_path, array):
    with pytest.raises(BadFile, match=r"x\.tif: has 32-bit pixels"):
        read_grey(save(tmp_path / "x.tif", array))


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_grey(save(tmp_path / "x.jpg", GREY, exif=exif)).shape == GREY.shape[::-1]


def test_postscript_is_refused_and_not_run_whatever_it_is_called(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(BadFile, match=r"x\.png: not a readable image$"):
        read_grey(path)


def test_several_images_in_a_file_are_an_error(tmp_path):
    frames = [Image.fromarray(GREY), Image.fromarray(GREY)]
    frames[0].save(tmp_path / "x.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(BadFile, match=r"x\.tif: contains 2 images"):
        read_grey(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.6])
def test_damaged_files_are_an_error_that_names_the_file(tmp_path, suffix, keep):
    path = save(tmp_path / f"x.{suffix}", np.tile(GREY, (20, 20)))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(BadFile, match=rf"x\.{suffix}: not a readable image") as error:
        read_grey(path)
    assert error.value.path == path


def test_images_are_antialiased_and_masks_stay_binary_when_resized():
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (32, 32))
    small = resize_image(stripes, 16, 8)
    assert small.shape == (8, 16)
    assert np.abs(small[:, 2:-2].astype(int) - 127).max() < 10
    assert set(np.unique(resize_mask(stripes, 17, 9))) <= {0, 255}
    assert resize_mask(stripes, 17, 9).shape == (9, 17)


def test_16_bit_colour_keeps_its_low_bytes(tmp_path):
    path = write_png_of_16_bits(tmp_path / "x.png", np.array([[[0, 0, 0], [100, 100, 100], [255, 255, 255]]]))
    np.testing.assert_array_equal(read_grey(path), [[0, 100, 255]])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(64, 300), min_size=1, max_size=2),
    original=st.integers(64, 600),
    centre=st.tuples(st.floats(0.35, 0.65), st.floats(0.35, 0.65)),
    radius=st.floats(0.2, 0.33),
)
def test_resizing_keeps_position_and_area_at_any_ratio(sizes, original, centre, radius):
    """A disc stays where it is through one or two resizes; single masks are off by the staircase of their outline."""
    disc = image = mask = draw_disc(original, centre, radius)
    for size in sizes:
        image, mask = resize_image(image, size, size), resize_mask(mask, size, size)
    pixel = 1 / min(original, *sizes)
    np.testing.assert_allclose(centre_of(image), centre_of(disc), atol=0.03 * pixel)
    np.testing.assert_allclose(centre_of(mask), centre_of(disc), atol=0.4 * pixel)
    assert abs((mask > 0).mean() - (disc > 0).mean()) < 2 * np.pi * radius * 0.3 * pixel


@pytest.mark.parametrize("sizes", [(512, 256), (512, 128), (256, 85), (600, 256), (100, 256), (512, 256, 128)], ids=str)
def test_resizing_has_no_mean_shift_and_keeps_the_mean_area(sizes):
    """Nearest-neighbour sampling moves masks by 0.25 pixels and more at even factors."""
    generator = np.random.default_rng(0)
    shifts, areas = [], []
    for centre, radius in zip(generator.uniform(0.4, 0.6, (40, 2)), generator.uniform(0.1, 0.3, 40), strict=True):
        disc = resized = draw_disc(sizes[0], centre, radius)
        for size in sizes[1:]:
            resized = resize_mask(resized, size, size)
        shifts.append(np.subtract(centre_of(resized), centre) * min(sizes))
        areas.append((resized > 0).mean() / (disc > 0).mean())
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.02  # pixels
    assert abs(np.mean(areas) - 1) < 0.003


def test_training_loader_resizes_like_the_conversion():
    disc = draw_disc(512, (0.43, 0.57), 0.2)
    sample = Sample("disc", disc, disc, {})
    loaded = ResizedDataset([sample], 256)[0]
    for array in (loaded.image, loaded.mask):
        np.testing.assert_allclose(centre_of(array), (0.43, 0.57), atol=0.0002)
    np.testing.assert_array_equal(loaded.mask, resize_mask(disc, 256, 256))


def draw_disc(size, centre, radius):
    x, y = np.meshgrid((np.arange(size) + 0.5) / size, (np.arange(size) + 0.5) / size)
    return np.where((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2, 255, 0).astype(np.uint8)


def centre_of(image):
    """Return x and y of the centre of mass, as fractions of the sides."""
    weights = image / image.sum()
    positions = (np.arange(len(image)) + 0.5) / len(image)
    return weights.sum(axis=0) @ positions, weights.sum(axis=1) @ positions
