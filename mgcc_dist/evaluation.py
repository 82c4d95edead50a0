"""Scores of a segmentation network over a set of labeled images, divided over the ranks."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from mgcc_dist.data.loader import Batch
from mgcc_dist.metrics import count, scores_of, surface_distances


@torch.no_grad()
def score_images(
    network: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, surface: bool
) -> list[dict[str, Any]]:
    """Per-image scores {"key", "paper", "corrected", ...} of every image of all ranks, sorted by key. Collective.

    `network` maps images [B,1,H,W] to logits [B,1,H,W] and is in evaluation mode. `surface` adds the (slow) HD95 and
    average surface distance. Pixels are counted on the device, and without surfaces nothing waits for it before the
    last batch.
    """
    keys: list[str] = []
    counts: list[Tensor] = []  # int64 [B,3] of each batch, on the device
    distances: list[dict[str, float | None]] = []
    pixels = 0
    for batch in batches:
        moved = batch.to(accelerator.device)
        with accelerator.autocast():
            logits = network(moved.images)
        predicted, truth = logits.float().sigmoid() > 0.5, moved.masks > 0.5
        keys += batch.keys
        counts.append(count(predicted, truth))
        pixels = predicted[0].numel()
        if surface:
            pairs = zip(predicted.cpu().numpy()[:, 0], truth.cpu().numpy()[:, 0], strict=True)
            distances += [surface_distances(*pair) for pair in pairs]

    rows = torch.cat(counts).tolist() if counts else []
    scores = [{"key": key, **scores_of(row, pixels)} for key, row in zip(keys, rows, strict=True)]
    if surface:
        scores = [score | more for score, more in zip(scores, distances, strict=True)]
    return sorted(gather_object(scores), key=lambda score: score["key"])
