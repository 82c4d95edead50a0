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
    """The image as uint8 [H,W].

    Raises:
        BadFile: not a readable image, or of a kind that has no sensible 8-bit grey.
    """
    pixels = _pixels(path)
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).convert("L")) if pixels.ndim == 3 else pixels
    bits = next(bits for bits in (8, 10, 12, 14, 16) if int(pixels.max()) < 2**bits)
    return (pixels >> (bits - 8)).astype(np.uint8)


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
    """uint8 [H,W] grey or [H,W,3] colour, on black where transparent; or uint16 [H,W]."""
    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise BadFile(path, f"is not a readable image ({error})") from error
    if frames > 1:
        raise BadFile(path, f"holds {frames} images; save each as a file")
    if upright.mode in ("1", "L"):
        return np.asarray(upright.convert("L"))
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        pixels = np.asarray(upright)
        if pixels.min() < 0 or pixels.max() > 65535 or (pixels != np.floor(pixels)).any():
            raise BadFile(path, "has 32-bit pixels; save it with 8 or 16 bits")
        return pixels.astype(np.uint16)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        black = Image.new("RGBA", upright.size, (0, 0, 0, 255))
        upright = Image.alpha_composite(black, upright)
    return np.asarray(upright.convert("RGB"))
