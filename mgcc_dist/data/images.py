"""Read image files of any depth and colour as 8-bit grey arrays (masks: masks.py).

Transparency is composited onto black; colours and palettes become luminance (ITU-R 601). 16-bit images are scaled to
8 bits using the smallest of 8, 10, 12, 14 and 16 bits that fits the maximum, so that a 12-bit image in a 16-bit file is
not black. The maximum is that of all images of a dataset, or of a single image read alone. EXIF rotation is applied. Of
a phone's MPO file the first picture is read; other files with several images are rejected.
"""

import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mgcc_dist.common.errors import UserError

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k"),
    *(".dib", ".pbm", ".pgm", ".ppm", ".pnm", ".tga"),
)

FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "JPEG2000", "PPM", "TGA")
"""of Pillow, which goes by a file's content; others are refused, because it opens PostScript with a program"""

STRIP_PIXELS = 2**22
"""pixels that are converted at once"""


class BadFile(UserError):
    """An image or mask file that cannot be used, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def find_unreadable(path: Path) -> BadFile | None:
    """Return why a file can't be opened or is empty; None if it can be read. Does not wait for a pipe."""
    try:
        if not path.is_file():
            missing = "links to a file that does not exist" if path.is_symlink() else "does not exist"
            return BadFile(path, "is not a file" if path.exists() else missing)
        with path.open("rb") as file:
            return None if file.read(1) else BadFile(path, "not a readable image (the file is empty)")
    except OSError as error:
        return BadFile(path, f"can't be read ({error.strerror})")


def read_grey(path: Path, bits: int | None = None, content: bytes | None = None) -> np.ndarray:
    """Read an image file as uint8 [H,W]; `bits` is how many bits of 16-bit pixels are used (None: see `bits_used`).

    `content` is that of the file, if it is not on the disk.

    Raises:
        BadFile: the file is not a readable image or has no sensible 8-bit grey representation, or its pixels have more
            bits.
    """
    try:
        return to_8_bits(read_pixels(path, content), bits)
    except ValueError as error:
        raise BadFile(path, str(error)) from error


def bits_used(paths: Iterable[Path]) -> int | None:
    """Return how many bits the 16-bit images among these files use, or None if there is none.

    One scale for all images of a dataset keeps their brightness comparable. Unreadable files count as none.
    """
    found = []
    for path in paths:
        try:
            if _has_16_bits(path):
                found.append(smallest_bits(read_pixels(path)))
        except BadFile:  # reported when the image is read
            continue
    return max(found, default=None)


def grey_from_image(image: Image.Image) -> np.ndarray:
    """Convert a PIL image to uint8 [H,W], by the same rules as a file.

    Raises:
        UserError: it has 32-bit pixels that are not whole numbers from 0 to 65535.
    """
    try:
        return to_8_bits(_decode_pixels(image))
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
        return to_8_bits(_decode_pixels(Image.fromarray(pixels)))
    if pixels.dtype == np.uint16 and pixels.ndim == 2:
        return to_8_bits(pixels)
    raise UserError(
        f"image: expected pixels of uint8 (grey or colour) or uint16 (grey), got {pixels.dtype} of shape {list(shape)}"
        ". Scale them to 0 to 255 and convert them to uint8."
    )


def resize_image(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize uint8 [H,W] to [height,width] with antialiased bilinear interpolation, ignoring the aspect ratio."""
    if image.shape == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize uint8 [H,W] of 0 and 255 to [height,width] like an image, then threshold at the midpoint.

    Nearest-neighbour interpolation would move the mask against its image by half a source pixel at even factors. At
    exactly the midpoint, where an edge passes through a pixel's centre, every second pixel is lesion: all or none would
    change the area, by 0.8% for BUSI from 512 to 256.
    """
    if mask.shape == (height, width):
        return mask
    image = Image.fromarray(mask.astype(np.float32))
    values = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    every_second = np.add.outer(np.arange(height), np.arange(width)) % 2 == 0
    lesion = np.where(np.abs(values - 127.5) < 0.25, every_second, values > 127.5)
    return np.where(lesion, 255, 0).astype(np.uint8)


def load_image(path: Path, content: bytes | None = None) -> tuple[Image.Image, Image.Image | None]:
    """Load an image file, or its `content`, with EXIF rotation applied; of 16-bit colour also one with the low bytes.

    Pillow keeps only the high bytes of 16-bit colour. The unpacker for the other byte order returns the low ones.

    Raises:
        BadFile: not a readable image, or a file with several.
    """
    low_bytes = None
    if content is None and (bad := find_unreadable(path)):
        raise bad
    source = path if content is None else io.BytesIO(content)
    try:
        with Image.open(source, formats=FORMATS) as image:
            # Phones append other pictures (depth, preview) to the first one and call it JPEG.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            other_order = _other_byte_order(image)
            _rotate(image)
        if other_order and frames == 1:
            with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as low_bytes:
                low_bytes.tile = other_order
                _rotate(low_bytes)
    except Image.DecompressionBombError as error:
        raise BadFile(path, f"is too large (more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels)") from error
    except UnidentifiedImageError as error:
        raise BadFile(path, "not a readable image") from error
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise BadFile(path, f"not a readable image ({error})") from error
    if frames > 1:
        raise BadFile(path, f"contains {frames} images. Save each to its own file.")
    return image, low_bytes


def deep_colour(high_bytes: Image.Image, low_bytes: Image.Image) -> np.ndarray:
    """Combine the result of `load_image` to uint16 [H,W,3] or, with transparency, [H,W,4]."""
    return np.asarray(high_bytes).astype(np.uint16) * 256 + np.asarray(low_bytes)


def _rotate(image: Image.Image) -> None:
    """Decode an image and apply its EXIF rotation, without the copy of an image that has none."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)


def _other_byte_order(image: ImageFile.ImageFile) -> list[Any]:
    """Return the tiles of a 16-bit colour image with the byte order swapped, and an empty list for other images.

    Raises:
        ValueError: 16-bit grey with transparency, of which Pillow can read the high bytes only.
    """
    swapped = []
    for tile in image.tile:
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        mode = re.fullmatch(r"(RGB|RGBA|RGBX|LA);16([LBN])", str(arguments[0]))
        if not mode:
            return []
        if mode[1] == "LA":
            raise ValueError("16-bit grey with transparency. Save it without transparency.")
        order = "L" if mode[2] == "B" or (mode[2] == "N" and sys.byteorder == "big") else "B"
        changed = (f"{mode[1]};16{order}", *arguments[1:])
        swapped.append(tile._replace(args=changed if isinstance(tile.args, tuple) else changed[0]))
    return swapped


def read_pixels(path: Path, content: bytes | None = None) -> np.ndarray:
    """Read grey uint8 or uint16 [H,W], or 16-bit colour [H,W,3], from a file or its content. Raises BadFile."""
    image, low_bytes = load_image(path, content)
    try:
        if low_bytes is not None:
            return deep_colour(image, low_bytes)[:, :, :3]
        return _decode_pixels(image)
    except ValueError as error:
        raise BadFile(path, str(error)) from error


def _decode_pixels(image: Image.Image) -> np.ndarray:
    """Convert to grey [H,W] of uint8 (transparency composited onto black) or uint16.

    Raises:
        ValueError: 32-bit pixels that do not fit 16 bits.
    """
    if image.mode == "L":
        return np.asarray(image)
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16, copy=False)
    if image.mode in ("I", "F"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535 or (pixels != np.floor(pixels)).any():
            raise ValueError("has 32-bit pixels. Save it with 8 or 16 bits.")
        return pixels.astype(np.uint16)
    grey = Image.new("L", image.size)
    height = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):  # a large image is not held in memory as RGBA too
        strip = image.crop((0, top, image.width, min(top + height, image.height)))
        grey.paste(_as_grey(strip), (0, top))
    return np.asarray(grey)


def _as_grey(image: Image.Image) -> Image.Image:
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB").convert("L")


def _has_16_bits(path: Path) -> bool:
    """Return whether a file has 16-bit (or 32-bit) pixels, without decoding them."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.mode.startswith(("I", "F")) or bool(_other_byte_order(image))
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise BadFile(path, f"not a readable image ({error})") from error


def smallest_bits(pixels: np.ndarray) -> int:
    """Return the smallest of 8, 10, 12, 14 and 16 bits that holds all of `pixels`, uint16 of any shape."""
    return next(bits for bits in (8, 10, 12, 14, 16) if int(pixels.max()) < 2**bits)


def to_8_bits(pixels: np.ndarray, bits: int | None = None) -> np.ndarray:
    """Convert the result of `read_pixels` to grey uint8 [H,W].

    Raises:
        ValueError: 16-bit pixels have more than `bits` bits.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.ndim == 3:
        pixels = (pixels @ np.array([299, 587, 114], np.uint32) // 1000).astype(np.uint16)
    bits = bits or smallest_bits(pixels)
    if int(pixels.max()) >= 2**bits:
        raise ValueError(f"has pixels up to {int(pixels.max())}, more than {bits} bits hold")
    return (pixels >> (bits - 8)).astype(np.uint8)
