import numpy as np
import pytest
from PIL import Image

from mgcc_dist.data.images import BadFile, read_grey, read_mask, resize_image, resize_mask

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


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("bits", "top"), [(8, 255), (12, 4095), (16, 65535)])
def test_12_and_16_bit_pixels_are_scaled_to_the_8_bit_range(tmp_path, suffix, bits, top):
    deep = np.array([[0, top // 2, top]], dtype=np.uint16)
    np.testing.assert_array_equal(read_grey(save(tmp_path / f"x.{suffix}", deep)), [[0, 127, 255]])


@pytest.mark.parametrize("array", [np.array([[0.5, 2.0]], dtype=np.float32), np.array([[0, 2**20]], dtype=np.int32)])
def test_32_bit_pixels_are_an_error_that_names_the_file(tmp_path, array):
    with pytest.raises(BadFile, match=r"x\.tif: has 32-bit pixels"):
        read_grey(save(tmp_path / "x.tif", array))


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_grey(save(tmp_path / "x.jpg", GREY, exif=exif)).shape == GREY.shape[::-1]


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


def test_mask_is_foreground_where_any_channel_is_nonzero(tmp_path):
    faint = np.zeros((2, 3, 3), dtype=np.uint8)
    faint[0, 1, 2] = 1  # luminance 0
    faint[1, 2, :] = 255
    np.testing.assert_array_equal(read_mask(save(tmp_path / "x.png", faint)), [[0, 255, 0], [0, 0, 255]])
    assert read_mask(save(tmp_path / "y.png", np.array([[0, 1, 300]], dtype=np.uint16))).tolist() == [[0, 255, 255]]


def test_jpeg_artefacts_do_not_enlarge_masks(tmp_path):
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[13:27, 11:30] = 255
    np.testing.assert_array_equal(read_mask(save(tmp_path / "x.jpg", mask)), mask)


def test_images_are_antialiased_and_masks_stay_binary_when_resized():
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (32, 32))
    small = resize_image(stripes, 16, 8)
    assert small.shape == (8, 16)
    assert np.abs(small[:, 2:-2].astype(int) - 127).max() < 10
    assert set(np.unique(resize_mask(stripes, 17, 9))) <= {0, 255}
    assert resize_mask(stripes, 17, 9).shape == (9, 17)
