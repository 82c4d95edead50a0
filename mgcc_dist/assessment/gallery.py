"""Draw real, reconstructed and synthetic images, one row each, into one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mgcc_dist.common.files import replacing
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.diffusion.autoencoder import Autoencoder, reconstruct
from mgcc_dist.evaluation.gallery import TRUTH


@torch.no_grad()
def save_gallery(real: Tensor, vae: Autoencoder, synthetic: ShardFolder, path: Path) -> None:
    """Save the gallery as PNG. `real` are validation images [N,1,H,W] in [-1, 1], on which no network was trained."""
    shown = [synthetic[i] for i in range(min(len(real), len(synthetic)))]
    masks = [sample.mask for sample in shown if sample.mask is not None]
    label = "synthetic\n(with mask)" if masks else "synthetic"
    rows = {
        "real\n(validation)": list(real[:, 0].numpy()),
        "reconstructed": list(reconstruct(vae, real)[:, 0].numpy()),
        label: [sample.image / 127.5 - 1 for sample in shown],
    }
    save_rows(rows, path, {label: masks})


def save_rows(
    rows: Mapping[str, Sequence[np.ndarray]], path: Path, masks: Mapping[str, Sequence[np.ndarray]] | None = None
) -> None:
    """Save a grid of grayscale images [H,W] in [-1, 1] as PNG, with one labelled row per item of `rows`.

    The contours of `masks`, uint8 [H,W], are drawn over the images of their row.
    """
    from matplotlib.figure import Figure  # half a second to import, and most processes draw nothing

    columns = max(len(images) for images in rows.values())
    figure = Figure(figsize=(1.5 * columns + 1, 1.55 * len(rows)), layout="constrained", dpi=120)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (label, images), row in zip(rows.items(), axes, strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[], frame_on=False)
        row[0].set_ylabel(label, fontsize=12)
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image, cmap="gray", vmin=-1, vmax=1)
        for axis, mask in zip(row, (masks or {}).get(label, ()), strict=False):
            if mask.any():
                axis.contour(mask > 0, levels=[0.5], colors=TRUTH, linewidths=1.2)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png")
