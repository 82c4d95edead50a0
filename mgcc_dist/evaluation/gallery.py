"""Example predictions of a segmentation run as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mgcc_dist.common.files import replacing
from mgcc_dist.data.datasets import subset_by_keys
from mgcc_dist.data.geometry import Fit
from mgcc_dist.data.loader import EvalLoader
from mgcc_dist.data.records import ShardFolder

TRUTH, PREDICTION = "#35c46a", "#ff5a4e"
LEGEND = "ground truth green, prediction red"


@dataclass(frozen=True)
class Case:
    """One panel: an image [H,W] of 0 to 255, its truth and what was predicted, both [H,W] in [0,1]."""

    title: str
    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray


def draw_cases(cases: Sequence[Case], caption: str, path: Path, columns: int | None = None) -> None:
    """Draw images with the contours of ground truth and prediction, `columns` in a row (None: all)."""
    from matplotlib.figure import Figure  # half a second to import, and most processes draw nothing

    columns = columns or len(cases)
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.3 * rows + 0.3), layout="constrained")
    # Without ticks: their sizes would be computed although they are hidden, which takes half of the time.
    panels = figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []}).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, case in zip(panels, cases, strict=False):
        panel.imshow(case.image, cmap="gray", vmin=0, vmax=255)
        for values, color in ((case.truth, TRUTH), (case.predicted, PREDICTION)):
            if (values > 0.5).any() and min(values.shape) > 1:  # contours need two pixels in each direction
                panel.contour(values, levels=[0.5], colors=color, linewidths=1.4)
        panel.set_title(case.title, fontsize=8)
    figure.suptitle(caption, fontsize=8)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=110)


@torch.no_grad()
def segmentation_gallery(
    network: nn.Module,
    data: ShardFolder,
    scores: list[dict[str, Any]],
    image_size: int,
    path: Path,
    count: int = 6,
    fit: Fit = "stretch",
) -> None:
    """Draw `count` lesion images from the worst to the best IoU.

    `network` is in evaluation mode; `scores` are its scores by `score_images`, for records of `data`.
    """
    ranked = sorted((score for score in scores if score["lesion"]), key=lambda score: score["lesion"]["iou"])
    indices = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    shown = [ranked[index] for index in indices]
    if not shown:
        return
    device = next(network.parameters()).device
    chosen = subset_by_keys(data, [score["key"] for score in shown])
    cases = []
    batches = EvalLoader(chosen, batch=1, image_size=image_size, rank=0, world=1, workers=0, fit=fit).batches()
    for score, batch in zip(shown, batches, strict=True):
        predicted = network(batch.to(device).images).float().sigmoid()[0, 0].cpu().numpy()
        title = f"{score['key']}\nIoU {100 * score['lesion']['iou']:.0f} %"
        cases.append(Case(title, batch.images[0, 0].numpy(), batch.masks[0, 0].numpy(), predicted))
    draw_cases(cases, f"validation images from worst to best: {LEGEND}", path)
