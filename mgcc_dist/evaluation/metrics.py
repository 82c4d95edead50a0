"""Scores of a predicted mask against the true one, per image, and their means over a data set.

Four scores under three protocols, all in [0,1]. With TP, FP, FN counted over the pixels of one image:

paper      what the paper's released code computes, to the bit: IoU = (TP + 1e-5) / (TP + FP + FN + 1e-5), Recall =
           TP / (TP + FN + 1e-6), Precision = TP / (TP + FP + 1e-6), F1 = 2 R P / (R + P + 1e-6). For the last three
           it takes as foreground what equals the true mask's highest value, so an EMPTY true mask counts as all
           foreground: a normal image that is rightly predicted empty scores IoU 1 but Recall, Precision and F1 of 0.
corrected  the same ratios without smoothing. Where true mask and prediction are both empty all four are 1; any other
           ratio of 0 by 0 is 0.
lesion     corrected, over the images with a lesion only.

Beside them: specificity (the share of images without lesion that are predicted empty), HD95 (95th percentile of the
Hausdorff distance) and ASD (average symmetric surface distance), both in pixels of the masks as given. A distance is
undefined (None) where one of the two masks is empty; means are over the images where it is defined, which are counted.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def count(predicted: Tensor, truth: Tensor) -> Tensor:
    """int64 [B,3] on the masks' device: pixels in both, in `predicted` and in `truth`; bool masks [B,...].

    All that the protocols need of a batch; nothing waits for the device.
    """
    masks = (predicted & truth, predicted, truth)
    return torch.stack([mask.flatten(1).sum(1) for mask in masks], dim=1)


def scores_of(counts: Sequence[int], pixels: int) -> dict[str, Any]:
    """Scores of one image of `pixels` pixels from its row of `count`, as `score_image` gives them without surfaces."""
    overlap, found, there = counts
    corrected = _corrected(overlap, found, there)
    return {
        "paper": _paper(overlap, found, there, pixels),
        "corrected": corrected,
        "lesion": corrected if there else None,
        "predicted_empty": not found,
    }


def score_image(predicted: np.ndarray, truth: np.ndarray, surface: bool) -> dict[str, Any]:
    """Scores of one image: {"paper": {...}, "corrected": {...}, "lesion": {...} | None, "predicted_empty": bool}.

    `predicted` and `truth` are bool [H,W]. `surface` adds "hd95" and "asd" (float | None), in some 5 ms.
    """
    counts = [int(mask.sum()) for mask in (predicted & truth, predicted, truth)]
    scores = scores_of(counts, truth.size)
    return scores | surface_distances(predicted, truth) if surface else scores


def summarize(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over images, from what `score_image` gave for each.

    {"paper": {...}, "corrected": {...}, "lesion": {...} | None, "specificity": float | None, "images": n, "lesions": n}
    and, if the scores hold them, {"hd95": float | None, "asd": float | None, "surfaces": n}. None stands for the mean
    over no image. `scores` is not empty.
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
    return summary


def _paper(overlap: int, found: int, there: int, pixels: int) -> dict[str, float]:
    iou = (overlap + 1e-5) / (found + there - overlap + 1e-5)
    if not there:  # an empty truth is taken as all foreground
        overlap, there = found, pixels
    recall = float(overlap) / (float(there) + 1e-6)
    precision = float(overlap) / (float(found) + 1e-6)
    f1 = 2 * recall * precision / (recall + precision + 1e-6)
    return {"iou": iou, "recall": recall, "precision": precision, "f1": f1}


def _corrected(overlap: int, found: int, there: int) -> dict[str, float]:
    if not found and not there:
        return dict.fromkeys(("iou", "recall", "precision", "f1"), 1.0)
    return {
        "iou": overlap / (found + there - overlap),
        "recall": overlap / there if there else 0.0,
        "precision": overlap / found if found else 0.0,
        "f1": 2 * overlap / (found + there),
    }


def surface_distances(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """{"hd95", "asd"} of one image, in pixels; None where a mask is empty. `predicted` and `truth` are bool [H,W]."""
    if not predicted.any() or not truth.any():
        return {"hd95": None, "asd": None}
    # Importing monai takes seconds, and only a final evaluation needs it.
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    pair = [torch.from_numpy(mask)[None, None].float() for mask in (predicted, truth)]  # [1,1,H,W]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # monai 1.6 warns of an argument that it passes itself
        hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95)
        asd = compute_average_surface_distance(*pair, include_background=True, symmetric=True)
    return {"hd95": hd95.item(), "asd": asd.item()}


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
