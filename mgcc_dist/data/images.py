"""Image files in: PNG, JPEG, BMP, TIFF of any depth and colour become 8-bit grey arrays, and masks 0 and 255.

How pixels become 8-bit grey: transparent ones lie on black; colours and palettes by luminance (ITU-R 601); 16-bit
ones lose their low bits, by the smallest of 8, 10, 12, 14 and 16 bits that holds the image's maximum, so that a 12-bit
image in a 16-bit file is not black. A camera's EXIF rotation is applied. A mask is 255 where any channel is not 0; in a
JPEG where one is over 127, since its compression leaves faint pixels around the edges.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mgcc_dist.common.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class BadFile(UserError):
    """An image or mask file that cannot be used: `path` and what is wrong with it, as words that follow the path."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}")
        self.path = path
        self.problem = problem


def read_grey(path: Path) -> np.ndarray:
    """Read an image file as uint8 [H,W].

    Raises:
        BadFile: not a readable image, or of a kind that has no sensible 8-bit grey.
    """
    return _eight_bits(_pixels(path))


def grey_from_image(image: Image.Image) -> np.ndarray:
    """Convert a PIL image to uint8 [H,W], by the same rules as a file.

    Raises:
        UserError: it has 32-bit pixels that are not whole numbers from 0 to 65535.
    """
    try:
        return _eight_bits(_pixels_of(image))
    except ValueError as error:
        raise UserError(f"image: {error}") from error


def grey_from_array(pixels: np.ndarray) -> np.ndarray:
    """Convert an array [H,W], [H,W,1], [H,W,3] (RGB) or [H,W,4] (RGBA) of uint8 or uint16 to uint8 [H,W].

    Raises:
        UserError: another shape or dtype; colour must be uint8.
    """
    shape = pixels.shape
    if pixels.ndim == 3 and shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and shape[2] in (3, 4))):
        raise UserError(f"image: expected an array [H,W], [H,W,1], [H,W,3] or [H,W,4], got the shape {list(shape)}")
    if pixels.dtype == np.uint8:
        return _eight_bits(_pixels_of(Image.fromarray(pixels)))
    if pixels.dtype == np.uint16 and pixels.ndim == 2:
        return _eight_bits(pixels)
    raise UserError(
        f"image: expected pixels of uint8 (grey or colour) or uint16 (grey), got {pixels.dtype} of shape {list(shape)}"
        ". Scale them to 0 to 255 and convert them to uint8."
    )


def read_mask(path: Path) -> np.ndarray:
    """The mask as uint8 [H,W] of 0 and 255.

    Raises:
        BadFile: as `read_grey`.
    """
    pixels = _pixels(path)
    on = pixels > (127 if path.suffix.lower() in (".jpg", ".jpeg") else 0)
    return np.where(on.any(axis=2) if on.ndim == 3 else on, 255, 0).astype(np.uint8)


def resize_image(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [H,W] to [height,width]: bilinear, antialiased where it shrinks, stretched to the new proportions."""
    if image.shape == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [H,W] to [height,width] by the nearest pixel, so that no new values appear."""
    if mask.shape == (height, width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def _pixels(path: Path) -> np.ndarray:
    """Read uint8 [H,W] grey or [H,W,3] colour, on black where transparent; or uint16 [H,W]."""
    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise BadFile(path, f"is not a readable image ({error})") from error
    if frames > 1:
        raise BadFile(path, f"holds {frames} images; save each as a file")
    try:
        return _pixels_of(upright)
    except ValueError as error:
        raise BadFile(path, str(error)) from error


def _pixels_of(image: Image.Image) -> np.ndarray:
    """uint8 [H,W] grey or [H,W,3] colour, on black where transparent; or uint16 [H,W].

    Raises:
        ValueError: 32-bit pixels that do not fit 16 bits.
    """
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535 or (pixels != np.floor(pixels)).any():
            raise ValueError("has 32-bit pixels; save it with 8 or 16 bits")
        return pixels.astype(np.uint16)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB"))


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H,W] of what `_pixels_of` gives."""
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).convert("L")) if pixels.ndim == 3 else pixels
    bits = next(bits for bits in (8, 10, 12, 14, 16) if int(pixels.max()) < 2**bits)
    return (pixels >> (bits - 8)).astype(np.uint8)
