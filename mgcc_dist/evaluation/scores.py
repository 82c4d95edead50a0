"""Score a segmentation network on a set of labeled images, divided over the ranks."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mgcc_dist.common.distributed import gather_by_index
from mgcc_dist.common.errors import SharedError
from mgcc_dist.data.batch import Batch, ByteBatch
from mgcc_dist.data.geometry import STRETCHED, Fit, restore
from mgcc_dist.data.loader import EvalLoader
from mgcc_dist.evaluation.metrics import pixel_counts, scores_from_counts
from mgcc_dist.evaluation.surface import surface_distances

CACHE_BYTES = 2**30


class CachedBatches:
    """The batches of a loader, cached on the device after the first pass.

    Later validations start no loader processes, decode nothing and copy nothing: BUSI's 254 images of 256x256 take
    133 MB. If the batches exceed CACHE_BYTES, every pass reads the loader again.
    """

    def __init__(self, loader: EvalLoader, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self._cache: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._cache is not None:
            yield from self._cache
            return
        cached, size = [], 0
        for batch in self.loader.batches():
            moved = batch.to(self.device)
            yield moved
            size += moved.images.nbytes + moved.masks.nbytes + sum(mask.nbytes for mask in moved.own_masks)
            if size <= CACHE_BYTES:
                cached.append(moved)
        if size <= CACHE_BYTES:
            self._cache = cached


@torch.no_grad()
def score_images(
    network: nn.Module,
    batches: Iterable[Batch | ByteBatch],
    accelerator: Accelerator,
    surface: bool,
    fit: Fit = "stretch",
) -> list[dict[str, Any]]:
    """Score every image of all ranks: a list of {"key", "paper", "corrected", ...}, sorted by key. Collective.

    `network` maps images [B,1,H,W] to logits [B,1,H,W] and is in evaluation mode. `surface` adds HD95 and average
    surface distance, which are slow. Pixels are counted on the device; without `surface` nothing waits for it before
    the last batch.

    Stretched images are scored on the network's square. Under another `fit` each is scored at its own size, so that a
    lesion outside the crop counts as missed.

    Raises:
        SharedError: the network's output for an image is not finite.
    """
    keys: list[str] = []
    counts: list[Tensor] = []  # int64 [B,4] per batch, on the device: whether the output is finite, pixel counts
    distances: list[dict[str, float | None]] = []
    pixels: list[int] = []
    for batch in batches:
        moved = batch.to(accelerator.device)
        with accelerator.autocast():
            logits = network(moved.images)
        probability = logits.float().sigmoid()
        keys += batch.keys
        finite = logits.isfinite().flatten(1).all(dim=1, keepdim=True)
        for predicted, truth, part in _comparisons(probability, moved, fit):
            counts.append(torch.cat([finite[part], pixel_counts(predicted, truth)], dim=1))
            pixels += [predicted[0].numel()] * len(predicted)
            if surface:
                pairs = zip(predicted.cpu().numpy()[:, 0], truth.cpu().numpy()[:, 0], strict=True)
                distances += [surface_distances(*pair) for pair in pairs]

    rows = torch.cat(counts).tolist() if counts else []
    broken = gather_by_index((key, key) for key, row in zip(keys, rows, strict=True) if not row[0])
    if broken:
        raise SharedError(
            f"scoring: the network's output for image {broken[0]!r} is not finite (NaN or infinity), as for "
            f"{len(broken) - 1} others. Try loop.precision no or a lower loop.learning_rate."
        )
    scores = [
        {"key": key, **scores_from_counts(row[1:], size)} for key, row, size in zip(keys, rows, pixels, strict=True)
    ]
    if surface:
        scores = [score | distance for score, distance in zip(scores, distances, strict=True)]
    return gather_by_index((score["key"], score) for score in scores)


def _comparisons(probability: Tensor, batch: Batch, fit: Fit) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Yield predicted and true masks bool [N,1,H,W] to compare, with the rows of the batch that they are."""
    if fit in STRETCHED:
        yield probability > 0.5, batch.masks > 0.5, slice(None)
        return
    for row, truth in enumerate(batch.own_masks):
        own = restore(probability[row, 0], (truth.shape[0], truth.shape[1]), fit)
        yield own[None, None] > 0.5, truth[None, None], slice(row, row + 1)
