"""Read image files: PNG, JPEG, BMP and TIFF of any depth and colour become 8-bit grey arrays, masks 0 and 255.

Transparency is composited onto black; colours and palettes become luminance (ITU-R 601). 16-bit images are scaled to
8 bits using the smallest of 8, 10, 12, 14 and 16 bits that fits the image's maximum, so that a 12-bit image in a 16-bit
file is not black. EXIF rotation is applied. A mask is 255 where any channel is nonzero; in a JPEG, where one is above
127, because compression leaves artefacts around the edges.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mgcc_dist.common.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class BadFile(UserError):
    """An image or mask file that cannot be used, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def read_grey(path: Path) -> np.ndarray:
    """Read an image file as uint8 [H,W].

    Raises:
        BadFile: the file is not a readable image or has no sensible 8-bit grey representation.
    """
    return _to_8_bits(_read_pixels(path))


def grey_from_image(image: Image.Image) -> np.ndarray:
    """Convert a PIL image to uint8 [H,W], by the same rules as a file.

    Raises:
        UserError: it has 32-bit pixels that are not whole numbers from 0 to 65535.
    """
    try:
        return _to_8_bits(_decode_pixels(image))
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
        return _to_8_bits(_decode_pixels(Image.fromarray(pixels)))
    if pixels.dtype == np.uint16 and pixels.ndim == 2:
        return _to_8_bits(pixels)
    raise UserError(
        f"image: expected pixels of uint8 (grey or colour) or uint16 (grey), got {pixels.dtype} of shape {list(shape)}"
        ". Scale them to 0 to 255 and convert them to uint8."
    )


def read_mask(path: Path) -> np.ndarray:
    """Read a mask as uint8 [H,W] of 0 and 255.

    Raises:
        BadFile: as for `read_grey`.
    """
    pixels = _read_pixels(path)
    foreground = pixels > (127 if path.suffix.lower() in (".jpg", ".jpeg") else 0)
    return np.where(foreground.any(axis=2) if foreground.ndim == 3 else foreground, 255, 0).astype(np.uint8)


def resize_image(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize uint8 [H,W] to [height,width] with antialiased bilinear interpolation, ignoring the aspect ratio."""
    if image.shape == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize uint8 [H,W] to [height,width] with nearest-neighbour interpolation, which keeps masks binary."""
    if mask.shape == (height, width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def _read_pixels(path: Path) -> np.ndarray:
    """Read uint8 [H,W] grey, uint8 [H,W,3] colour or uint16 [H,W] from a file."""
    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise BadFile(path, f"not a readable image ({error})") from error
    if frames > 1:
        raise BadFile(path, f"contains {frames} images. Save each to its own file.")
    try:
        return _decode_pixels(upright)
    except ValueError as error:
        raise BadFile(path, str(error)) from error


def _decode_pixels(image: Image.Image) -> np.ndarray:
    """Convert to uint8 [H,W] grey, uint8 [H,W,3] colour (transparency composited onto black) or uint16 [H,W].

    Raises:
        ValueError: 32-bit pixels that do not fit 16 bits.
    """
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535 or (pixels != np.floor(pixels)).any():
            raise ValueError("has 32-bit pixels. Save it with 8 or 16 bits.")
        return pixels.astype(np.uint16)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB"))


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Convert the result of `_decode_pixels` to grey uint8 [H,W]."""
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).convert("L")) if pixels.ndim == 3 else pixels
    bits = next(bits for bits in (8, 10, 12, 14, 16) if int(pixels.max()) < 2**bits)
    return (pixels >> (bits - 8)).astype(np.uint8)
