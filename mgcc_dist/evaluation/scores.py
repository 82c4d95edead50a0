"""Scores of a segmentation network over a set of labeled images, divided over the ranks."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from mgcc_dist.data.loader import Batch, ByteBatch, EvalLoader
from mgcc_dist.evaluation.metrics import count, scores_of, surface_distances

KEPT_BYTES = 2**30


class KeptBatches:
    """The batches of a loader, again and again; from the second pass on they are on the device already.

    A validation then starts no loader processes, decodes nothing and copies nothing: BUSI's 254 images of 256x256 take
    133 MB. Batches beyond KEPT_BYTES are not kept, and the loader is asked for all of them again.
    """

    def __init__(self, loader: EvalLoader, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self._kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept, size = [], 0
        for batch in self.loader.batches():
            moved = batch.to(self.device)
            yield moved
            size += moved.images.nbytes + moved.masks.nbytes
            if size <= KEPT_BYTES:
                kept.append(moved)
        if size <= KEPT_BYTES:
            self._kept = kept


@torch.no_grad()
def score_images(
    network: nn.Module, batches: Iterable[Batch | ByteBatch], accelerator: Accelerator, surface: bool
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
