"""Example predictions of a segmentation run as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch import nn

from mgcc_dist.common.files import replacing
from mgcc_dist.data.datasets import subset_by_keys
from mgcc_dist.data.geometry import Fit
from mgcc_dist.data.loader import EvalLoader, Ranks
from mgcc_dist.data.records import ShardFolder

TRUTH, PREDICTION = "#35c46a", "#ff5a4e"
LEGEND = "ground truth green, prediction red"
PANEL, TITLE, GAP = 220, 34, 5
"""pixels: width of a panel and the most of its image's height; height of a title; border around a panel"""
RESAMPLE = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class Case:
    """One panel: an image [H,W] of 0 to 255, its truth and what was predicted, both [H,W] in [0,1]."""

    title: str
    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray


def draw_cases(cases: Sequence[Case], caption: str, path: Path, columns: int | None = None) -> None:
    """Draw images with the contours of ground truth and prediction, `columns` in a row (None: all)."""
    columns = columns or len(cases)
    panels = [_panel(case) for case in cases]
    width, height = PANEL + 2 * GAP, max(panel.height for panel in panels) + 2 * GAP
    picture = Image.new("RGB", (columns * width, TITLE + -(-len(panels) // columns) * height), "white")
    _write(picture, caption)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        picture.paste(panel, (column * width + GAP, TITLE + row * height + GAP))
    with replacing(path) as scratch:
        picture.save(scratch, format="PNG")


def _panel(case: Case) -> Image.Image:
    """Draw a case below its title, with its longer side resized to `PANEL` pixels."""
    height, width = (max(1, round(PANEL * side / max(case.image.shape))) for side in case.image.shape)
    image = Image.fromarray(case.image.astype(np.float32)).resize((width, height), RESAMPLE).convert("RGB")
    for values, color in ((case.truth, TRUTH), (case.predicted, PREDICTION)):
        resized = Image.fromarray(values.astype(np.float32)).resize((width, height), RESAMPLE)
        inside = Image.fromarray(np.where(np.asarray(resized) > 0.5, 255, 0).astype(np.uint8))
        outer, inner = (inside.filter(each(3)) for each in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
        image.paste(color, mask=ImageChops.difference(outer, inner))
    panel = Image.new("RGB", (PANEL, TITLE + height), "white")
    panel.paste(image, ((PANEL - width) // 2, TITLE))
    _write(panel, case.title)
    return panel


def _write(picture: Image.Image, text: str) -> None:
    """Write up to two lines at the top of `picture`, centered."""
    font = ImageFont.load_default(12)
    ImageDraw.Draw(picture).multiline_text((picture.width // 2, 2), text, "black", font, "ma", align="center")


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
    batches = EvalLoader(chosen, batch=1, image_size=image_size, ranks=Ranks(), fit=fit).batches()
    for score, batch in zip(shown, batches, strict=True):
        predicted = network(batch.to(device).images).float().sigmoid()[0, 0].cpu().numpy()
        title = f"{score['key']}\nIoU {100 * score['lesion']['iou']:.0f} %"
        cases.append(Case(title, batch.images[0, 0].numpy(), batch.masks[0, 0].numpy(), predicted))
    draw_cases(cases, f"validation images from worst to best:\n{LEGEND}", path)
