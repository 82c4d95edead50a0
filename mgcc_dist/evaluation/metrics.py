"""Segmentation metrics of one image, and their means over a data set.

IoU, recall, precision and F1 in [0,1] under three protocols. TP, FP and FN count the pixels of one image:

paper      bit-identical to the paper's released code: IoU = (TP + 1e-5) / (TP + FP + FN + 1e-5), Recall = TP /
           (TP + FN + 1e-6), Precision = TP / (TP + FP + 1e-6), F1 = 2 R P / (R + P + 1e-6). For the last three its
           foreground is every pixel equal to the ground truth's maximum, so an EMPTY ground truth counts as all
           foreground: a normal image correctly predicted empty scores IoU 1 but recall, precision and F1 of 0.
corrected  the same ratios without smoothing. If ground truth and prediction are both empty, all four are 1; any other
           0/0 is 0.
lesion     corrected, only over the images with a lesion.

Also specificity (fraction of images without lesion that are predicted empty), HD95 (95th percentile of the Hausdorff
distance) and ASD (average symmetric surface distance), both in pixels of the given masks. A distance is undefined
(None) if one of the masks is empty; means are over the images where it is defined, and their number is reported. A
network that misses difficult lesions therefore looks better by them. The penalized variants are defined for every image
with a lesion: a missed lesion counts as the diagonal of the image, the largest distance there can be.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgcc_dist.evaluation.surface import PENALIZED, surface_distances


def pixel_counts(predicted: Tensor, truth: Tensor) -> Tensor:
    """Count the pixels of bool masks [B,...]: int64 [B,3] on their device, of TP, `predicted` and `truth`.

    These counts are all that the protocols need; nothing waits for the device.
    """
    masks = (predicted & truth, predicted, truth)
    return torch.stack([mask.flatten(1).sum(1) for mask in masks], dim=1)


def scores_from_counts(counts: Sequence[int], pixels: int) -> dict[str, Any]:
    """Score one image of `pixels` pixels from its row of `pixel_counts`; as `score_image` without surface distances."""
    tp, predicted, truth = counts
    corrected = _corrected(tp, predicted, truth)
    return {
        "paper": _paper(tp, predicted, truth, pixels),
        "corrected": corrected,
        "lesion": corrected if truth else None,
        "predicted_empty": not predicted,
    }


def score_image(predicted: np.ndarray, truth: np.ndarray, surface: bool) -> dict[str, Any]:
    """Score one image: {"paper": {...}, "corrected": {...}, "lesion": {...} | None, "predicted_empty": bool}.

    `predicted` and `truth` are bool [H,W]. `surface` adds "hd95", "asd", "hd95_penalized" and "asd_penalized" (float |
    None), which takes about 1 ms.
    """
    counts = [int(mask.sum()) for mask in (predicted & truth, predicted, truth)]
    scores = scores_from_counts(counts, truth.size)
    return scores | surface_distances(predicted, truth) if surface else scores


def summarize(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the scores of `score_image` over images.

    Returns {"paper": {...}, "corrected": {...}, "lesion": {...} | None, "specificity": float | None, "images": n,
    "lesions": n} and, if the scores have them, {"hd95": float | None, "asd": float | None, "surfaces": n,
    "hd95_penalized": float | None, "asd_penalized": float | None}. "surfaces" counts the images of the first two,
    "lesions" those of the penalized ones. None means that there is no image to average. `scores` must not be empty.
    """
    lesion = [score["lesion"] for score in scores if score["lesion"]]
    normal = [float(score["predicted_empty"]) for score in scores if not score["lesion"]]
    summary: dict[str, Any] = {
        "paper": _means([score["paper"] for score in scores]),
        "corrected": _means([score["corrected"] for score in scores]),
        "lesion": _means(lesion) if lesion else None,
        "specificity": _mean(normal),
        "images": len(scores),
        "lesions": len(lesion),
    }
    if "hd95" in scores[0]:
        defined = [score for score in scores if score["hd95"] is not None]
        summary["hd95"] = _mean([score["hd95"] for score in defined])
        summary["asd"] = _mean([score["asd"] for score in defined])
        summary["surfaces"] = len(defined)
        for name in PENALIZED:
            summary[name] = _mean([score[name] for score in scores if score[name] is not None])
    return summary


def _paper(tp: int, predicted: int, truth: int, pixels: int) -> dict[str, float]:
    iou = (tp + 1e-5) / (predicted + truth - tp + 1e-5)
    if not truth:  # the released code takes an empty ground truth as all foreground
        tp, truth = predicted, pixels
    recall = float(tp) / (float(truth) + 1e-6)
    precision = float(tp) / (float(predicted) + 1e-6)
    f1 = 2 * recall * precision / (recall + precision + 1e-6)
    return {"iou": iou, "recall": recall, "precision": precision, "f1": f1}


def _corrected(tp: int, predicted: int, truth: int) -> dict[str, float]:
    if not predicted and not truth:
        return dict.fromkeys(("iou", "recall", "precision", "f1"), 1.0)
    return {
        "iou": tp / (predicted + truth - tp),
        "recall": tp / truth if truth else 0.0,
        "precision": tp / predicted if predicted else 0.0,
        "f1": 2 * tp / (predicted + truth),
    }


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
