"""The probability above which a pixel is lesion, and the choice of it on validation images.

`choose` takes the one of THRESHOLDS with the highest mean IoU (corrected protocol). Of equally good ones it takes the
one that is closest to 0.5. It sees probabilities before a temperature is applied.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from mgcc_dist.common.errors import UserError

DEFAULT = 0.5
THRESHOLDS = tuple(percent / 100 for percent in range(5, 100, 5))


def parse(word: str) -> float:
    """Read a threshold.

    Raises:
        UserError: it is not a number between 0 and 1.
    """
    try:
        value = float(word)
    except ValueError:
        value = -1
    if not 0 < value < 1:
        raise UserError(f"--threshold {word}: is not a number between 0 and 1, choose, or the folder of an evaluation")
    return value


def threshold_scores(probability: np.ndarray, truth: np.ndarray) -> list[float]:
    """Return the IoU (corrected protocol) of one image at each of THRESHOLDS.

    Args:
        probability: float32 [H,W].
        truth: bool [H,W].
    """
    from mgcc_dist.evaluation.metrics import scores_from_counts  # torch, which a report does not need

    limits = np.array(THRESHOLDS, np.float32)
    # How many pixels, and pixels of the lesion, are above each limit: p > limit, as in a prediction.
    predicted, overlap = (
        len(values) - np.searchsorted(np.sort(values), limits, side="right")
        for values in (probability.ravel(), probability[truth])
    )
    lesion = int(truth.sum())
    counts = [(tp, area, lesion) for tp, area in np.stack([overlap, predicted], axis=1).tolist()]
    return [scores_from_counts(each, truth.size)["corrected"]["iou"] for each in counts]


def choose(scores: Iterable[Sequence[float]]) -> float:
    """Return the threshold with the highest mean of `threshold_scores` over images."""
    means = np.mean(np.array(list(scores)), axis=0).round(9)  # rounding errors must not decide between equal thresholds
    best = np.flatnonzero(means == means.max())
    return min((THRESHOLDS[index] for index in best), key=lambda threshold: abs(threshold - DEFAULT))
