"""How an image becomes the square that a network sees, and how a probability on the square returns to the image.

stretch     the complete image is resized to the square, whatever its proportions (the paper)
letterbox   the complete image is resized with its proportions kept; the rest of the square is black
crop        the largest square in the middle of the image is resized; what is outside is not seen
released    as stretch, but resized as in MGCC's released code (Albumentations with OpenCV): images bilinearly without
            antialiasing, masks by their nearest pixel

Each fit maps a box of the image to a box of the square. Both boxes are centred, so a mirrored image gives a mirrored
square. To keep them centred in whole pixels, a side of a box may be one pixel longer or shorter than its exact length.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.images import STRIP_PIXELS, resize_image, resize_mask
from mgcc_dist.data.sample import STRETCHED, Fit, Sample


class Boxes(NamedTuple):
    """The part of the image that is seen, and the part of the square that shows it: rows and columns of each."""

    image: tuple[slice, slice]
    square: tuple[slice, slice]


def boxes(shape: tuple[int, int], size: int, fit: Fit) -> Boxes:
    """Return the boxes for an image of `shape` (height, width) and a square of `size` x `size`."""
    sides = seen = shape
    shown: tuple[float, ...] = (size, size)
    if fit == "letterbox":
        shown = tuple(side * size / max(sides) for side in sides)
    elif fit == "crop":
        seen = (min(sides), min(sides))
    image = [_centered(length, side) for length, side in zip(seen, sides, strict=True)]
    square = [_centered(length, size) for length in shown]
    return Boxes((image[0], image[1]), (square[0], square[1]))


def fit_image(image: np.ndarray, size: int, fit: Fit) -> np.ndarray:
    """Return the square uint8 [size,size] of an image uint8 [H,W], resized bilinearly and antialiased."""
    if fit == "released":
        return _interpolate(image, size, "bilinear")
    seen, shown = boxes((image.shape[0], image.shape[1]), size, fit)
    return _pasted(resize_image(np.ascontiguousarray(image[seen]), *_width_and_height(shown)), shown, size)


def fit_mask(mask: np.ndarray, size: int, fit: Fit) -> np.ndarray:
    """Return the square of a mask uint8 [H,W] of 0 and 255 (see `resize_mask`)."""
    if fit == "released":
        return _interpolate(mask, size, "nearest")
    seen, shown = boxes((mask.shape[0], mask.shape[1]), size, fit)
    return _pasted(resize_mask(np.ascontiguousarray(mask[seen]), *_width_and_height(shown)), shown, size)


def fit_sample(sample: Sample, size: int, fit: Fit) -> Sample:
    """Return a sample with its image and mask as squares.

    Raises:
        UserError: proportions are to be kept, but the sample was stretched to a square when its shards were written.
    """
    height, width = sample.image.shape
    original = tuple(sample.meta.get("original_size", (width, height)))
    if fit not in STRETCHED and height == width and original[0] != original[1]:
        raise UserError(
            f"data.fit: {fit} keeps proportions, but record {sample.key!r} is stored as {width}x{height} and its image "
            f"is {original[0]}x{original[1]}. Create the shards again without --size, or set data.fit to stretch."
        )
    mask = None if sample.mask is None else fit_mask(sample.mask, size, fit)
    return replace(sample, image=fit_image(sample.image, size, fit), mask=mask)


def restore(square: Tensor, shape: tuple[int, int], fit: Fit) -> Tensor:
    """Return values float [S,S] on the square at the image's own `shape` (height, width); 0 where it was not seen.

    Bilinear, antialiased where the image is smaller.
    """
    seen, shown = boxes(shape, square.shape[0], fit)
    rows, columns = seen
    values = _resize(square[shown], rows.stop - rows.start, columns.stop - columns.start)
    return F.pad(values, (columns.start, shape[1] - columns.stop, rows.start, shape[0] - rows.stop))


def restore_strips(square: Tensor, shape: tuple[int, int], fit: Fit) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield `restore` of a large image in strips of columns: their box in the image, and their values.

    What was not seen is left out. Columns are independent once the square has the image's width.
    """
    seen, shown = boxes(shape, square.shape[0], fit)
    rows, columns = seen
    height, width = rows.stop - rows.start, columns.stop - columns.start
    wide = _resize(square[shown], shown[0].stop - shown[0].start, width)
    step = max(1, STRIP_PIXELS // height)
    for start in range(0, width, step):
        stop = min(start + step, width)
        box = (rows, slice(columns.start + start, columns.start + stop))
        yield box, _resize(wide[:, start:stop], height, stop - start)


def _resize(values: Tensor, height: int, width: int) -> Tensor:
    if width == 1:  # PyTorch 2.13 resizes a single column wrongly
        column = F.interpolate(values[None, None], (values.shape[0], 1), mode="bilinear", antialias=True)[0, 0]
        return _resize(column.repeat(1, 2), height, 2)[:, :1]
    return F.interpolate(values[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]


def _interpolate(pixels: np.ndarray, size: int, mode: Literal["bilinear", "nearest"]) -> np.ndarray:
    """Resize uint8 [H,W] to [size,size] as OpenCV does: PyTorch without antialiasing has the same sampling points."""
    values = torch.from_numpy(pixels.astype(np.float32))[None, None]
    return F.interpolate(values, (size, size), mode=mode)[0, 0].round().to(torch.uint8).numpy()


def _centered(length: float, total: int) -> slice:
    """Return the middle of `total` pixels, as near to `length` as whole pixels at both ends allow."""
    start = min(int((total - length) / 2 + 0.5), (total - 1) // 2)
    return slice(start, total - start)


def _width_and_height(box: tuple[slice, slice]) -> tuple[int, int]:
    rows, columns = box
    return columns.stop - columns.start, rows.stop - rows.start


def _pasted(pixels: np.ndarray, box: tuple[slice, slice], size: int) -> np.ndarray:
    """Return a black square with `pixels` in `box`."""
    if pixels.shape == (size, size):
        return pixels
    square = np.zeros((size, size), pixels.dtype)
    square[box] = pixels
    return square
