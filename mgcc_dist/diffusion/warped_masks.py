"""Lesion masks for synthetic images: masks of training images, warped at random, never as they are.

A mask is a function of (seed, index), its class and the training masks:

1. The source is a training mask of the class that does not touch the image's border, where lesions are cut off.
2. Its area becomes one drawn from the areas of the class, at most AREA_FACTOR times larger or smaller.
3. The shape is mirrored half of the time, stretched, rotated by up to 15 degrees and deformed elastically.
4. Its center moves by up to SHIFT of the side, and back as far as the lesion needs to stay in the image.

Images stay upright because shadows fall downwards, so there are no quarter turns. A mask is drawn again until its
overlap (IoU) with every training mask and their mirror images is at most MAX_IOU, which rules out copies. Normal images
have empty masks, which stay empty.
"""

import hashlib

import numpy as np
from scipy.ndimage import map_coordinates

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.datasets import SampleDataset
from mgcc_dist.data.images import resize_mask
from mgcc_dist.diffusion.noise import RngStream, generator_seed

MAX_IOU = 0.8
AREA_FACTOR = 2.5
MIN_AREA = 8  # pixels
SHIFT = 0.15  # of the side
ROTATION = np.radians(15)
STRETCH = np.log(1.2)
ELASTIC = 0.08  # standard deviation of the displacements, relative to the root of the lesion's area
GRID = 9  # control points of the displacements along each side of the square in which they are drawn
REACH = 2.0  # half of that square's side, relative to the root of the area
ATTEMPTS = 200


class WarpedMasks:
    """Draws lesion masks of `size` x `size` pixels.

    Args:
        samples: labeled training samples.

    Raises:
        UserError: there are none.
    """

    def __init__(self, samples: SampleDataset, size: int) -> None:
        self.size = size
        by_class: dict[str, list[np.ndarray]] = {}
        for sample in (samples[i] for i in range(len(samples))):
            assert sample.mask is not None
            by_class.setdefault(sample.meta["class"], []).append(resize_mask(sample.mask, size, size) > 0)
        if not by_class:
            raise UserError("masks: no training image has a mask. Choose a split with labeled images.")
        self.masks = {name: np.stack(masks) for name, masks in sorted(by_class.items())}
        """by class, bool [N,S,S]"""
        lesions = np.concatenate([masks[masks.any(axis=(1, 2))] for masks in self.masks.values()])
        self._packed = np.packbits(np.concatenate([lesions, lesions[:, :, ::-1]]).reshape(-1, size * size), axis=1)
        self._areas = count_bits(self._packed)
        digest = hashlib.sha256(repr((self.counts, size)).encode())
        for masks in self.masks.values():
            digest.update(np.packbits(masks).tobytes())
        self.sha256 = digest.hexdigest()
        """of the training masks"""

    @property
    def counts(self) -> dict[str, int]:
        """Number of training masks per class."""
        return {name: len(masks) for name, masks in self.masks.items()}

    def draw(self, name: str, seed: int, index: int) -> np.ndarray:
        """Return the mask of image `index`, uint8 [S,S] of 0 and 255, for an image of the class `name`.

        Raises:
            UserError: the class has lesions from which no other mask could be made.
        """
        random = np.random.default_rng(generator_seed(seed, RngStream.MASK, index))
        masks = self.masks[name]
        source = masks[random.integers(len(masks))]
        if not source.any():
            return np.zeros((self.size, self.size), np.uint8)
        lesions = masks[masks.any(axis=(1, 2))]
        areas = np.sort(lesions.mean(axis=(1, 2)))
        inside = lesions[~_touches_border(lesions)]
        sources = inside if len(inside) else lesions
        for _ in range(ATTEMPTS):
            source = sources[random.integers(len(sources))]
            mask = warp(source, float(np.quantile(areas, random.random())), random)
            if mask.sum() >= MIN_AREA and not _touches_border(mask[None])[0] and self.overlap(mask) <= MAX_IOU:
                return mask.astype(np.uint8) * 255
        raise UserError(
            f"masks: no mask of class {name!r} that differs from the training masks was found in {ATTEMPTS} attempts "
            f"(IoU of at most {MAX_IOU}). Choose a larger data.image_size, or check the masks of this class."
        )

    def overlap(self, mask: np.ndarray) -> float:
        """Return the highest IoU of a mask, bool [S,S], with a training mask or its mirror image."""
        if not len(self._packed):
            return 0.0
        common = count_bits(self._packed & np.packbits(mask.ravel()))
        return float((common / (self._areas + mask.sum() - common)).max())


def warp(source: np.ndarray, area: float, random: np.random.Generator) -> np.ndarray:
    """Return the lesion of `source`, bool [S,S], warped to about `area`, a share of the image; bool [S,S]."""
    side = len(source)
    points = np.argwhere(source) + 0.5  # of pixel centers: row, column
    center, pixels = points.mean(axis=0), len(points)
    scale = np.sqrt(np.clip(area * source.size / pixels, 1 / AREA_FACTOR, AREA_FACTOR))
    angle, stretch = random.uniform(-ROTATION, ROTATION), np.exp(random.uniform(-STRETCH, STRETCH))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.diag([stretch, 1 / stretch]) @ np.diag([1.0, random.choice([-1.0, 1.0])])
    extent = np.ptp((points - center) @ matrix.T, axis=0).max() + 1
    margin = 1 + 2 * ELASTIC * np.sqrt(pixels) * scale  # displacements widen the lesion
    scale = min(scale, max(side - 2 * margin, 1) / extent)
    moved = (points - center) @ matrix.T * scale
    target = center + random.uniform(-SHIFT, SHIFT, 2) * side
    low, high = margin - moved.min(axis=0), side - margin - moved.max(axis=0)
    target = np.clip(target, np.minimum(low, high), np.maximum(low, high))

    radius = np.sqrt(pixels) * scale
    first = np.floor(moved.min(axis=0) + target - margin).astype(int).clip(0, side)
    last = np.ceil(moved.max(axis=0) + target + margin).astype(int).clip(0, side)
    box = tuple(last - first)  # outside of it there is nothing to draw
    here = (np.indices(box).reshape(2, -1).T + first + 0.5 - target) / radius
    controls = random.normal(0, ELASTIC, (2, GRID, GRID))
    at = (here.T / REACH + 1) / 2 * (GRID - 1)
    displaced = here + np.stack([map_coordinates(control, at, order=3, mode="nearest") for control in controls], axis=1)
    there = displaced * radius / scale @ np.linalg.inv(matrix).T + center - 0.5
    values = map_coordinates(source.astype(np.float32), there.T, order=1, mode="constant")
    mask = np.zeros_like(source)
    mask[first[0] : last[0], first[1] : last[1]] = (values > 0.5).reshape(box)
    return mask


def _touches_border(masks: np.ndarray) -> np.ndarray:
    """Return which masks, bool [N,S,S], reach the border of the image."""
    inner = masks[:, 1:-1, 1:-1]
    return np.not_equal(masks.sum(axis=(1, 2)), inner.sum(axis=(1, 2)))


def count_bits(packed: np.ndarray) -> np.ndarray:
    """Count the set bits of rows uint8 [N,B]."""
    return np.bitwise_count(packed).sum(axis=1, dtype=np.int64)
