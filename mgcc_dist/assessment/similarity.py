"""Similarity of two images after the best alignment: high for a transformed copy, low for everything else.

In pixels, it is the correlation that `data.duplicates` uses to find near-duplicates (band-pass filter, local contrast
normalization, shifts of up to 3 of 48 pixels), maximized also over the eight symmetries of the square and rotations by
-5, 0 and 5 degrees. An angle in between is off by at most 2.5 degrees, which moves the border of a 48x48 thumbnail by
one pixel.

On BUSI at 128x128 an image reaches at most 0.49 with any image of another group (60 images against 526). With a copy of
itself it reaches over 0.97 if the copy is flipped, rotated by 90 degrees or saved as JPEG with quality 30, over 0.86
with noise of 25 gray levels, and over 0.7 if it is rotated by 10 degrees or enlarged by 7 %.

In features (features.py), it is the cosine similarity of the two feature vectors, maximized over the eight symmetries
of the other image. The vectors are whitened by PCA: the mean of the training images is subtracted, and the
PCA_COMPONENTS largest principal components are divided by their standard deviations. This reduces what all ultrasound
images have in common, which is most of a vector. Without whitening a noisy copy is not found.
"""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mgcc_dist.assessment.features import FeatureExtractor
from mgcc_dist.data.augment import SYMMETRIES, symmetry
from mgcc_dist.data.datasets import SampleDataset
from mgcc_dist.data.duplicates import SHIFT, SIDE, thumbnail
from mgcc_dist.data.images import resize_image
from mgcc_dist.data.sample import Sample

ANGLES = (-5, 0, 5)  # degrees
# Of 8 to 128, the number that finds the most copies of BUSI images (docs/explanation/audit.md).
PCA_COMPONENTS = 64


def as_square(sample: Sample, size: int) -> np.ndarray:
    """Return the image of a sample as the diffusion model sees it, uint8 [size,size]."""
    return resize_image(sample.image, size, size)


def pixel_similarity(images: Sequence[np.ndarray], thumbnails: Tensor) -> tuple[Tensor, Tensor]:
    """Compare images uint8 [H,W] with thumbnails, float32 [N,48,48] from `duplicates.thumbnail` on any device.

    Returns, on the CPU, the similarity [Q,N] in [-1, 1] and the index [Q,N] of the best alignment, for
    `apply_alignment`.
    """
    rotated = [thumbnail(_rotate(image, angle)) for image in images for angle in ANGLES]
    variants = np.stack(
        [symmetry(structure, symmetry_index) for structure in rotated for symmetry_index in range(SYMMETRIES)]
    )
    inner = SIDE - 2 * SHIFT
    queries = _standardize(torch.from_numpy(variants[:, SHIFT:-SHIFT, SHIFT:-SHIFT].copy()).to(thumbnails.device))
    best = torch.full((len(variants), len(thumbnails)), -1.0, device=thumbnails.device)
    for y in range(2 * SHIFT + 1):
        for x in range(2 * SHIFT + 1):
            best = torch.maximum(best, queries @ _standardize(thumbnails[:, y : y + inner, x : x + inner]).T)
    similarity, alignment = best.view(len(images), len(ANGLES) * SYMMETRIES, len(thumbnails)).max(dim=1)
    return similarity.cpu(), alignment.cpu()


class FeatureSimilarity:
    """Similarity with the images of `training` in whitened features. Collective."""

    def __init__(self, extractor: FeatureExtractor, training: SampleDataset, accelerator: Accelerator) -> None:
        self._extractor = extractor
        self._accelerator = accelerator
        views = np.stack(
            [
                extractor.extract(_Transformed(training, symmetry_index), accelerator)
                for symmetry_index in range(SYMMETRIES)
            ]
        )
        self._mean = views[0].mean(axis=0)
        _, deviations, components = np.linalg.svd(views[0] - self._mean, full_matrices=False)
        kept = min(PCA_COMPONENTS, len(training) // 4, int((deviations > 1e-6 * deviations[0]).sum()))
        self._whitening = components[:kept].T / deviations[:kept]
        self._views = self._whiten(views)

    def compare(self, images: SampleDataset) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Compare each of `images` with each training image, on every rank. Collective.

        Returns the similarity [Q,N] in [-1, 1] and the symmetry [Q,N] of the training image at which it is reached.
        """
        queries = self._whiten(self._extractor.extract(images, self._accelerator))
        by_view = np.stack([queries @ view.T for view in self._views])
        return by_view.max(axis=0), by_view.argmax(axis=0)

    def _whiten(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the features as whitened vectors of unit length."""
        whitened = (features - self._mean) @ self._whitening
        return whitened / np.maximum(np.linalg.norm(whitened, axis=-1, keepdims=True), 1e-12)


class _Transformed:
    """The images of `dataset`, without masks, under one of the eight symmetries of the square."""

    def __init__(self, dataset: SampleDataset, symmetry_index: int) -> None:
        self._dataset = dataset
        self._symmetry_index = symmetry_index

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self._dataset[index]
        return Sample(sample.key, np.ascontiguousarray(symmetry(sample.image, self._symmetry_index)), None, sample.meta)


def apply_alignment(image: np.ndarray, alignment: int) -> np.ndarray:
    """Return the square image [S,S] in the orientation in which it is most similar to the other one."""
    angle, symmetry_index = divmod(alignment, SYMMETRIES)
    return symmetry(_rotate(image, ANGLES[angle]), symmetry_index)


def describe_alignment(alignment: int) -> str:
    """Return the alignment in words: `rotated by 5°, then by 90°, mirrored`."""
    angle, symmetry_index = divmod(alignment, SYMMETRIES)
    rotations = [f"{degrees}°" for degrees in (ANGLES[angle], symmetry_index % 4 * 90) if degrees]
    words = [f"rotated by {', then by '.join(rotations)}"] if rotations else []
    return ", ".join(words + ["mirrored"] * (symmetry_index >= 4)) or "unchanged"


def _rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate counterclockwise about the center, filling with black."""
    if not degrees:
        return image
    return np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR))


def _standardize(windows: Tensor) -> Tensor:
    """Return windows [N,h,w] as rows [N,h*w] of zero mean and unit length (a constant image becomes zero)."""
    rows = windows.flatten(1)
    rows = rows - rows.mean(dim=1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-6)
