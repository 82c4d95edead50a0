"""Pictures of a segmentation run."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from mgcc_dist.data.loader import EvalLoader, Subset
from mgcc_dist.files import replacing

TRUTH, PREDICTION = "#35c46a", "#ff5a4e"


@torch.no_grad()
def segmentation_gallery(
    network: nn.Module, validation: Subset, scores: list[dict[str, Any]], image_size: int, path: Path, count: int = 6
) -> None:
    """Draw `count` lesion images from the worst to the best IoU, with the contours of truth and prediction.

    `scores` are those of `evaluation.score_images` for every image of `validation`, in evaluation mode on the
    network's own device.
    """
    ranked = sorted((score for score in scores if score["lesion"]), key=lambda score: score["lesion"]["iou"])
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    shown = [ranked[place] for place in places]
    if not shown:
        return
    device = next(network.parameters()).device
    chosen = Subset(validation, [validation.position(score["key"]) for score in shown])
    figure = Figure(figsize=(2.1 * len(shown), 2.6), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for batch in EvalLoader(chosen, batch=1, image_size=image_size, rank=0, world=1, workers=0).batches():
        predicted = network(batch.images.to(device)).float().sigmoid()[0, 0].cpu().numpy()
        place = [score["key"] for score in shown].index(batch.keys[0])
        panel = panels[place]
        panel.imshow(batch.images[0, 0], cmap="gray", vmin=-1, vmax=1)
        panel.contour(batch.masks[0, 0], levels=[0.5], colors=TRUTH, linewidths=1.4)
        if (predicted > 0.5).any():
            panel.contour(predicted, levels=[0.5], colors=PREDICTION, linewidths=1.4)
        panel.set_title(f"{batch.keys[0]}\nIoU {100 * shown[place]['lesion']['iou']:.0f} %", fontsize=8)
        panel.axis("off")
    figure.suptitle("validation images from worst to best: truth green, prediction red", fontsize=8)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=110)
