"""Example predictions of a segmentation run as one picture."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from mgcc_dist.common.files import replacing
from mgcc_dist.data.datasets import subset_by_keys
from mgcc_dist.data.loader import EvalLoader
from mgcc_dist.data.records import ShardFolder

TRUTH, PREDICTION = "#35c46a", "#ff5a4e"


@torch.no_grad()
def segmentation_gallery(
    network: nn.Module, data: ShardFolder, scores: list[dict[str, Any]], image_size: int, path: Path, count: int = 6
) -> None:
    """Draw `count` lesion images from the worst to the best IoU, with the contours of ground truth and prediction.

    `network` is in evaluation mode; `scores` are its scores by `score_images`, for records of `data`.
    """
    ranked = sorted((score for score in scores if score["lesion"]), key=lambda score: score["lesion"]["iou"])
    indices = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    shown = [ranked[index] for index in indices]
    if not shown:
        return
    device = next(network.parameters()).device
    chosen = subset_by_keys(data, [score["key"] for score in shown])
    figure = Figure(figsize=(2.1 * len(shown), 2.6), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    batches = EvalLoader(chosen, batch=1, image_size=image_size, rank=0, world=1, workers=0).batches()
    for panel, score, batch in zip(panels, shown, batches, strict=True):
        predicted = network(batch.to(device).images).float().sigmoid()[0, 0].cpu().numpy()
        panel.imshow(batch.images[0, 0].numpy(), cmap="gray", vmin=0, vmax=255)
        panel.contour(batch.masks[0, 0].numpy(), levels=[0.5], colors=TRUTH, linewidths=1.4)
        if (predicted > 0.5).any():
            panel.contour(predicted, levels=[0.5], colors=PREDICTION, linewidths=1.4)
        panel.set_title(f"{score['key']}\nIoU {100 * score['lesion']['iou']:.0f} %", fontsize=8)
        panel.axis("off")
    figure.suptitle("validation images from worst to best: ground truth green, prediction red", fontsize=8)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=110)
