"""Scores of a segmentation network over a set of labeled images, divided over the ranks."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from mgcc_dist.data.loader import Batch
from mgcc_dist.metrics import score_image


@torch.no_grad()
def score_images(
    network: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, surface: bool
) -> list[dict[str, Any]]:
    """Per-image scores {"key", "paper", "corrected", ...} of every image of all ranks, sorted by key. Collective.

    `network` maps images [B,1,H,W] to logits [B,1,H,W] and is in evaluation mode. `surface` adds the (slow) HD95 and
    average surface distance.
    """
    scores = []
    for batch in batches:
        with accelerator.autocast():
            logits = network(batch.images.to(accelerator.device))
        predicted = (logits.float().sigmoid() > 0.5).cpu().numpy()[:, 0]
        truth = (batch.masks > 0.5).cpu().numpy()[:, 0]
        scores += [
            {"key": key, **score_image(p, t, surface=surface)}
            for key, p, t in zip(batch.keys, predicted, truth, strict=True)
        ]
    return sorted(gather_object(scores), key=lambda score: score["key"])
