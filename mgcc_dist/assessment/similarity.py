"""How alike two images are after the best alignment: high for a copy, however it was turned, and for nothing else.

In pixels it is the correlation of structure by which `data.duplicates` finds near-duplicates (band-pass, local
contrast, shifts of up to 3 of 48 pixels), best also over the eight symmetries of the square and rotations by -5, 0 and
5 degrees. A rotation between these is off by 2.5 degrees at most, which moves the rim of a 48 x 48 thumbnail by one
pixel.

On BUSI at 128 x 128 an image has at most 0.49 with any image of another group (60 images against 526); its own copy
has over 0.97 when flipped, quarter-turned or saved as JPEG of quality 30, over 0.86 under noise of 25 grey levels, and
over 0.7 when rotated by 10 degrees or enlarged by 7 %.

In features (features.py) it is the cosine between an image's vector and that of the other, best over the eight
symmetries of the other. The vectors are whitened: the mean of the training images is taken off, and each of their
COMPONENTS largest principal components divided by its standard deviation. What all ultrasound images share, which is
most of a vector, then counts no more than what tells them apart; without it a noisy copy is not found.
"""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mgcc_dist.assessment.features import Features
from mgcc_dist.data.augment import SYMMETRIES, symmetry
from mgcc_dist.data.duplicates import SHIFT, SIDE, thumbnail
from mgcc_dist.data.records import Sample
from mgcc_dist.data.sources import Source

ANGLES = (-5, 0, 5)  # degrees
COMPONENTS = 64  # of 8 to 128, the number that finds most copies of BUSI images (docs/explanation/audit.md)


def similarities(images: Sequence[np.ndarray], thumbnails: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image uint8 [H,W] with each thumbnail, float32 [N,48,48] of `duplicates.thumbnail` on any device.

    Returns, on the CPU, the similarity [Q,N] in [-1, 1] and the alignment [Q,N] that gave it, to be read by `align`.
    """
    turned = [thumbnail(_rotated(image, angle)) for image in images for angle in ANGLES]
    variants = np.stack([symmetry(structure, which) for structure in turned for which in range(SYMMETRIES)])
    inner = SIDE - 2 * SHIFT
    queries = _unit(torch.from_numpy(variants[:, SHIFT:-SHIFT, SHIFT:-SHIFT].copy()).to(thumbnails.device))
    best = torch.full((len(variants), len(thumbnails)), -1.0, device=thumbnails.device)
    for y in range(2 * SHIFT + 1):
        for x in range(2 * SHIFT + 1):
            best = torch.maximum(best, queries @ _unit(thumbnails[:, y : y + inner, x : x + inner]).T)
    similarity, alignment = best.view(len(images), len(ANGLES) * SYMMETRIES, len(thumbnails)).max(dim=1)
    return similarity.cpu(), alignment.cpu()


class FeatureSimilarity:
    """Likeness with the images of `training`, in whitened features. Collective."""

    def __init__(self, features: Features, training: Source, accelerator: Accelerator) -> None:
        self._features = features
        self._accelerator = accelerator
        views = np.stack([features.of(_Turned(training, which), accelerator) for which in range(SYMMETRIES)])
        self._mean = views[0].mean(axis=0)
        _, deviations, components = np.linalg.svd(views[0] - self._mean, full_matrices=False)
        kept = min(COMPONENTS, len(training) // 4, int((deviations > 1e-6 * deviations[0]).sum()))
        self._whiten = components[:kept].T / deviations[:kept]
        self._views = self._unit(views)

    def of(self, images: Source) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Of each of `images` with each training image, on every rank. Collective.

        Returns the similarity [Q,N] in [-1, 1] and the symmetry [Q,N] of the training image that gave it.
        """
        queries = self._unit(self._features.of(images, self._accelerator))
        by_view = np.stack([queries @ view.T for view in self._views])
        return by_view.max(axis=0), by_view.argmax(axis=0)

    def _unit(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        whitened = (features - self._mean) @ self._whiten
        return whitened / np.maximum(np.linalg.norm(whitened, axis=-1, keepdims=True), 1e-12)


class _Turned:
    """The images of `source`, without their masks, under one of the symmetries of the square."""

    def __init__(self, source: Source, which: int) -> None:
        self._source = source
        self._which = which

    def __len__(self) -> int:
        return len(self._source)

    def read(self, i: int) -> Sample:
        sample = self._source.read(i)
        return Sample(sample.key, np.ascontiguousarray(symmetry(sample.image, self._which)), None, sample.meta)


def align(image: np.ndarray, alignment: int) -> np.ndarray:
    """The square image [S,S] as it is most alike to the other."""
    angle, which = divmod(alignment, SYMMETRIES)
    return symmetry(_rotated(image, ANGLES[angle]), which)


def describe(alignment: int) -> str:
    """The alignment in words: `turned by 5°, then by 90°, mirrored`."""
    angle, which = divmod(alignment, SYMMETRIES)
    turns = [f"{degrees}°" for degrees in (ANGLES[angle], which % 4 * 90) if degrees]
    words = [f"turned by {', then by '.join(turns)}"] if turns else []
    return ", ".join(words + ["mirrored"] * (which >= 4)) or "as it is"


def _rotated(image: np.ndarray, degrees: float) -> np.ndarray:
    """Anticlockwise about the centre; what comes in from outside is black."""
    if not degrees:
        return image
    return np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR))


def _unit(windows: Tensor) -> Tensor:
    """Windows [N,h,w] as rows [N,h*w] of zero mean and unit length (an image without structure stays zero)."""
    rows = windows.flatten(1)
    rows = rows - rows.mean(dim=1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-6)
