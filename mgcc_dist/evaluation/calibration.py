"""Whether probabilities can be trusted: reliability diagram, ECE, Brier score, risk-coverage curve with AURC.

Reliability and ECE are those of the lesion probability of each pixel: BINS bins of equal width, and every image has the
same weight, however many pixels it has. Most pixels are plain background, so compare ECE only between runs on the same
images. The Brier score is the mean squared difference between probability and mask.

The risk-coverage curve sorts images by a confidence and shows the mean risk (1 - Dice) of the most confident share of
them. AURC is the mean of that curve: the risk of all images if the confidence says nothing, and lower the better it
sorts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15
Array = NDArray[np.float64]


def reliability_bins(probability: np.ndarray, truth: np.ndarray) -> Array:
    """Sum up one image by bins of its probability: float64 [3,BINS].

    The rows are the share of the pixels, the sum of probabilities and the sum of lesion pixels, the last two divided by
    the number of pixels. `probability` is float [H,W] in [0,1], `truth` bool [H,W].
    """
    flat = probability.ravel().astype(np.float64)
    bin_of = np.minimum((flat * BINS).astype(int), BINS - 1)
    sums = [np.bincount(bin_of, weights, BINS) for weights in (None, flat, truth.ravel())]
    return np.stack(sums).astype(np.float64) / flat.size


def brier(probability: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean squared difference between `probability` float [H,W] and `truth` bool [H,W]."""
    return float(np.mean((probability - truth) ** 2, dtype=np.float64))


def reliability(bins: Sequence[Array]) -> dict[str, Any]:
    """Average the `reliability_bins` of all images.

    Returns {"bins": [{"from", "to", "pixels", "probability", "lesion"}, ...], "ece": ECE}: per bin that has pixels
    their share of all, their mean probability and the share of them that is lesion.
    """
    share, probability, lesion = np.mean(bins, axis=0)
    used = np.flatnonzero(share)
    return {
        "bins": [
            {
                "from": i / BINS,
                "to": (i + 1) / BINS,
                "pixels": float(share[i]),
                "probability": float(probability[i] / share[i]),
                "lesion": float(lesion[i] / share[i]),
            }
            for i in used.tolist()
        ],
        "ece": float(np.abs(probability - lesion).sum()),
    }


def confidence(probability: np.ndarray, mask: np.ndarray) -> float:
    """Return the mean probability inside `mask`; for an empty mask 1 - the highest probability of the image.

    `probability` is float [H,W], `mask` bool [H,W].
    """
    return float(probability[mask].mean(dtype=np.float64) if mask.any() else 1 - probability.max())


def risk_coverage(confidences: Sequence[float], risks: Sequence[float]) -> dict[str, Any]:
    """Compute the risk-coverage curve.

    Returns {"risk": [mean risk of the 1, 2, ... N most confident images], "aurc", "aurc_best", "aurc_random"}: the mean
    of the curve, that of a confidence which sorts perfectly, and that of one which says nothing. Images of equal
    confidence count with their mean risk, so that their order does not matter.
    """
    curve, ideal = _selective_risk(np.asarray(confidences), np.asarray(risks)), np.sort(risks)
    return {
        "risk": curve.tolist(),
        "aurc": float(curve.mean()),
        "aurc_best": float(_selective_risk(-ideal, ideal).mean()),
        "aurc_random": float(np.mean(risks)),
    }


def _selective_risk(confidences: np.ndarray, risks: np.ndarray) -> Array:
    _, tie, size = np.unique(-confidences, return_inverse=True, return_counts=True)
    tied_risks = np.bincount(tie, risks) / size  # by falling confidence
    return np.repeat(tied_risks, size).cumsum() / np.arange(1, len(risks) + 1)
