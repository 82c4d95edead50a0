"""Predict one image at a time, whichever thread asks: the mask, a map of the uncertainty, and a score."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mgcc_dist.data.dicom_regions import Region, Spacing
from mgcc_dist.data.geometry import restore_strips
from mgcc_dist.inference.lesions import find_lesions
from mgcc_dist.inference.predictor import Predictor
from mgcc_dist.inference.results import restore_region
from mgcc_dist.inference.uncertainty import Members, UncertaintyKind, agreement, disagreement


@dataclass(frozen=True)
class Predicted:
    """What the network says about an image of height H and width W."""

    mask: np.ndarray
    """uint8 [H,W] of 0 and 255"""
    confidence: float
    score: float | None
    """agreement of the members; None without --uncertainty"""
    uncertainty: np.ndarray | None
    """disagreement of the members, uint8 [H,W]; 255 is 1 bit"""


class Segmenter:
    """A network with the members of `--uncertainty`; does one forward pass at a time."""

    def __init__(self, predictor: Predictor, members: Members | None, kind: UncertaintyKind | None) -> None:
        self.predictor, self._members, self.kind = predictor, members, kind
        # One thread for all requests: OpenMP would keep a team of threads for each thread that ever computed.
        self._thread = ThreadPoolExecutor(1, "network")

    @property
    def weights_sha256(self) -> str:
        return str(self.predictor.info["weights_sha256"])

    @property
    def score_id(self) -> str:
        """What a score depends on apart from the image."""
        predictors = self._members.predictors if self._members else []
        hashes = [str(each.info["weights_sha256"]) for each in predictors]
        return hashlib.sha256(" ".join([str(self.kind), *hashes]).encode()).hexdigest()[:16]

    def predict(self, image: np.ndarray, name: str) -> Predicted:
        """Predict an image uint8 [H,W].

        Raises:
            UserError: the network's output is not finite.
        """
        height, width = image.shape
        square = self.predictor.prepare(image).square
        probability = self._compute(self.predictor, square, name)
        members = self._compute(self._members, square, name) if self._members else None
        mask = np.zeros((height, width), np.uint8)
        region = Region(slice(0, height), slice(0, width), None)
        found = restore_region(probability, region, mask, None, self.predictor.fit, measure_all=False)
        if members is None:
            return Predicted(mask, found.confidence, None, None)
        seen = np.zeros((height, width), np.uint8)
        for box, strip in restore_strips(disagreement(members), (height, width), self.predictor.fit):
            seen[box] = np.rint(strip.numpy().clip(0, 1) * np.float32(255))
        return Predicted(mask, found.confidence, agreement(members), seen)

    def score(self, image: np.ndarray, name: str) -> float:
        """Return the agreement of the members, which must exist, on an image uint8 [H,W]."""
        assert self._members
        square = self.predictor.prepare(image).square
        return agreement(self._compute(self._members, square, name))

    def _compute(self, network: Predictor | Members, square: np.ndarray, name: str) -> Tensor:
        return self._thread.submit(network.squares, [square], [name]).result()[0]


def measure(mask: np.ndarray, spacing: Spacing | None) -> dict[str, Any]:
    """Return area, diameters and lines of the largest lesion of a mask uint8 [H,W], in mm if the spacing is known."""
    area = int(np.count_nonzero(mask))
    lesions = find_lesions(mask, spacing)
    largest = lesions[0] if lesions else None
    return {
        "unit": "mm" if spacing else "px",
        "area": area * spacing[0] * spacing[1] if spacing else area,
        "lesions": len(lesions),
        "longest": largest.longest if largest else 0,
        "perpendicular": largest.perpendicular if largest else 0,
        "lines": [largest.longest_line, largest.perpendicular_line] if largest else [],
    }
