"""The part of the memorization audit for samples with masks: near-copies of training masks, and of training pairs.

Two masks are compared by the overlap (IoU) of their lesions, both moved to the center of the image, so that a shape is
recognized wherever it lies. For masks it is the highest over the eight symmetries of the square. A pair of image and
mask is as similar to another one as the mean of two values: the similarity of the images in pixels, and the overlap of
the masks in the orientation in which the images fit best. An image that is only somewhat similar to a training image is
thus found if its mask is that image's, too. Masks without a lesion, and their pairs, are not compared.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from scipy.ndimage import binary_dilation

from mgcc_dist.assessment.similarity import ANGLES, apply_alignment, as_square, pixel_similarity
from mgcc_dist.common.distributed import gather_by_index
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.data.augment import SYMMETRIES
from mgcc_dist.data.datasets import SampleDataset
from mgcc_dist.data.duplicates import thumbnail
from mgcc_dist.data.images import resize_mask
from mgcc_dist.data.sample import Sample
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.diffusion.warped_masks import count_bits

LARGEST = 128  # side at which masks are compared, at most
UPRIGHT = range(ANGLES.index(0) * SYMMETRIES, (ANGLES.index(0) + 1) * SYMMETRIES)  # alignments without a small rotation
KINDS = ("masks", "pairs")


class Match(NamedTuple):
    """The training image to which a sample's mask or pair is most similar: its index in the training set."""

    similarity: float
    train_index: int
    alignment: int
    """of the sample, for `similarity.apply_alignment`"""


Matches = dict[str, Match]
"""by "masks" and "pairs"; empty without a lesion"""


class PairSimilarity:
    """Compares masks and pairs with those of the training images that have a lesion."""

    def __init__(self, images: ImageData, accelerator: Accelerator) -> None:
        self.images, self.side = images, min(images.size, LARGEST)
        self.accelerator = accelerator
        chosen, structures, masks = [], [], []
        for i in range(len(images.train)):
            sample = images.train[i]
            if (mask := self._lesion(sample)) is not None:
                chosen.append(i)
                structures.append(thumbnail(as_square(sample, self.images.size)))
                masks.append(np.packbits(_centered(mask)))
        self.indices = np.array(chosen)
        """of these images in the training set"""
        if chosen:
            self._thumbnails = torch.from_numpy(np.stack(structures)).to(accelerator.device)
            self._masks = np.stack(masks)

    def nearest(self, dataset: SampleDataset, indices: Sequence[int]) -> list[Matches]:
        """Return the most similar training mask and pair of each sample. Collective."""
        return self._each(dataset, indices, lambda index: np.ones(len(self.indices), bool), "comparing pairs")

    def highest_across_groups(self, indices: Sequence[int]) -> list[Matches]:
        """Return the same for real images, only compared with training images of other groups. Collective."""
        records = self.images.shards.records
        groups = np.array([records[self.images.train.indices[i]].group for i in self.indices])
        return self._each(self.images.shards, indices, lambda index: groups != records[index].group, "calibrating")

    def _each(
        self, dataset: SampleDataset, indices: Sequence[int], allowed: Callable[[int], np.ndarray], task: str
    ) -> list[Matches]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine, found = indices[rank::world], []
        with ProgressBar(len(indices), task, "images", share=len(mine)) as bar:
            for place, index in zip(range(rank, len(indices), world), mine, strict=True):
                found.append((place, self._compare(dataset[index], allowed(index))))
                bar.update()
        return gather_by_index(found)

    def _compare(self, sample: Sample, allowed: np.ndarray) -> Matches:
        lesion = self._lesion(sample)
        if lesion is None or not allowed.any():
            return {}
        of_masks = np.stack([self._overlap(lesion, alignment) for alignment in UPRIGHT])
        pixels, alignments = pixel_similarity([as_square(sample, self.images.size)], self._thumbnails)
        of_pairs = np.empty(len(self.indices))
        for alignment in np.unique(alignments):
            fits = alignments[0].numpy() == alignment
            of_pairs[fits] = (pixels[0].numpy()[fits] + self._overlap(lesion, int(alignment))[fits]) / 2
        best = int(np.where(allowed, of_masks.max(axis=0), -1).argmax())
        pair = int(np.where(allowed, of_pairs, -1).argmax())
        return {
            "masks": Match(
                float(of_masks[:, best].max()), int(self.indices[best]), UPRIGHT[int(of_masks[:, best].argmax())]
            ),
            "pairs": Match(float(of_pairs[pair]), int(self.indices[pair]), int(alignments[0, pair])),
        }

    def _overlap(self, lesion: np.ndarray, alignment: int) -> np.ndarray:
        """Return the IoU [N] of a lesion, in one orientation and centered, with the training lesions."""
        aligned = np.packbits(_centered(apply_alignment(lesion, alignment) > 127))
        return count_bits(self._masks & aligned) / count_bits(self._masks | aligned)

    def _lesion(self, sample: Sample) -> np.ndarray | None:
        """Return the mask as uint8 [side,side] of 0 and 255; None if there is no lesion or no mask."""
        if sample.mask is None:
            return None
        mask = resize_mask(sample.mask, self.side, self.side)
        return mask if mask.any() else None


def with_contour(sample: Sample, size: int) -> np.ndarray:
    """Return the image of a sample with a white contour around its lesion, uint8 [size,size]."""
    image = as_square(sample, size)
    if sample.mask is None:
        return image
    lesion = resize_mask(sample.mask, size, size) > 0
    return np.where(binary_dilation(lesion) & ~lesion, np.uint8(255), image)


def _centered(mask: np.ndarray) -> np.ndarray:
    """Move the lesion of a mask [S,S] to the middle of the image: bool [S,S]."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return mask > 0
    middle = [(len(mask) - 1 - int(each.min()) - int(each.max())) // 2 for each in (rows, columns)]
    return np.roll(mask > 0, middle, axis=(0, 1))
