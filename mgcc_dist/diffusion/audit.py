"""Does the model copy its training images? Every synthetic image beside the training image that it is most alike.

What is too alike is learned from the real images: for each of them (300 at most) the highest likeness with a training
image of another group, that is of another patient or, where patients are unknown, not a near-duplicate. The threshold
is the likeness that a share of `false_alarms` of them exceeds. A synthetic image above it is listed as a near-copy: it
is more like one patient's image than real images of different patients are.

`audit.json` has threshold, near-copies and, for every image, its nearest; `closest.png` shows the twenty closest
pairs. With `drop_copies` the near-copies are taken out of the shards.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from torch import Tensor

from mgcc_dist.config import UnitInterval
from mgcc_dist.data.duplicates import thumbnail
from mgcc_dist.data.images import resize_image
from mgcc_dist.data.loader import Source
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.diffusion.images import Images
from mgcc_dist.diffusion.likeness import align, describe, likenesses
from mgcc_dist.diffusion.selection import drop
from mgcc_dist.errors import UserError
from mgcc_dist.files import read_json, replacing, write_json

CALIBRATION = 300  # real images
PAIRS = 20  # in the picture
BLOCK = 16  # images compared at a time, to bound memory


@dataclass(frozen=True)
class AuditConfig:
    enabled: bool = True
    """look for copies of training images among the synthetic ones"""
    false_alarms: UnitInterval = 0.01
    """share of real images that would be taken for copies of another patient's; sets the threshold"""
    drop_copies: bool = False
    """take the near-copies out of the shards; otherwise they are only listed"""


def is_finished(config: AuditConfig, images: Images, samples: Path, folder: Path) -> bool:
    """Whether `folder` holds the audit of these samples, and its near-copies are dropped where they are to be."""
    path = folder / "audit.json"
    shards = ShardFolder.open(samples, verify=False)
    if not path.is_file() or read_json(path)["request"] != _request(config, images, shards):
        return False
    return not config.drop_copies or shards.index.get("dropped") is not None


def audit(config: AuditConfig, images: Images, samples: Path, folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Leave `audit.json` and `closest.png` in `folder`, and return the first. Collective."""
    shards = ShardFolder.open(samples, verify=False)
    data, learned = images.data, images.learned.indices
    thumbnails = torch.from_numpy(np.stack([thumbnail(_square(data, i, images.size)) for i in learned]))
    thumbnails = thumbnails.to(accelerator.device)
    floor = _real_likenesses(images, thumbnails, accelerator)
    threshold = float(np.quantile(floor, 1 - config.false_alarms))
    found = _nearest(shards, thumbnails, images.size, accelerator)
    values = [value for value, _, _ in found]
    rows = [
        {
            "key": record.key,
            "nearest": data.records[learned[j]].key,
            "likeness": round(value, 4),
            "alignment": describe(alignment),
            "near_copy": value > threshold,
        }
        for record, (value, j, alignment) in zip(shards.records, found, strict=True)
    ]
    copies = [record.key for record, value in zip(shards.records, values, strict=True) if value > threshold]
    report = {
        "request": _request(config, images, shards),
        "threshold": round(threshold, 4),
        "real": _summary(floor),
        "synthetic": _summary(values),
        "near_copies": copies,
        "images": rows,
    }
    if accelerator.is_main_process:
        pairs = []
        for i in sorted(range(len(found)), key=lambda i: -values[i])[:PAIRS]:
            _, j, alignment = found[i]
            synthetic = align(_square(shards, i, images.size), alignment)
            pairs.append((synthetic, _square(data, learned[j], images.size), rows[i]))
        _draw(pairs, threshold, folder / "closest.png")
        write_json(folder / "audit.json", report)
        if config.drop_copies:
            drop(samples, copies)
    accelerator.wait_for_everyone()
    return report


def _real_likenesses(images: Images, thumbnails: Tensor, accelerator: Accelerator) -> list[float]:
    """For each of at most CALIBRATION real images: the highest likeness with a training image of another group."""
    data, learned = images.data, images.learned.indices
    groups = np.array([data.records[i].group for i in learned])
    reals = np.random.default_rng(0).permutation(learned + images.unseen.indices)[:CALIBRATION].tolist()
    found = []
    for i in reals[accelerator.process_index :: accelerator.num_processes]:
        likeness, _ = likenesses([_square(data, i, images.size)], thumbnails)
        others = likeness[0][torch.from_numpy(groups != data.records[i].group)]
        found += [(i, others.max().item())] if len(others) else []
    values = [value for _, value in sorted(gather_object(found))]
    if not values:
        raise UserError(
            "audit: all images are of one group, so there is nothing to compare with; --audit.enabled false"
        )
    return values


def _nearest(
    shards: ShardFolder, thumbnails: Tensor, size: int, accelerator: Accelerator
) -> list[tuple[float, int, int]]:
    """For each synthetic image: likeness, number and alignment of the training image that it is most alike."""
    mine = list(range(len(shards)))[accelerator.process_index :: accelerator.num_processes]
    found = []
    for start in range(0, len(mine), BLOCK):
        block = mine[start : start + BLOCK]
        likeness, alignment = likenesses([_square(shards, i, size) for i in block], thumbnails)
        best, nearest = likeness.max(dim=1)
        chosen = alignment.gather(1, nearest[:, None])[:, 0]
        found += list(zip(block, best.tolist(), nearest.tolist(), chosen.tolist(), strict=True))
    return [(value, j, which) for _, value, j, which in sorted(gather_object(found))]


def _square(source: Source, i: int, size: int) -> np.ndarray:
    """The image [S,S] as the model saw it."""
    return resize_image(source.read(i).image, size, size)


def _summary(values: list[float]) -> dict[str, float]:
    return {"images": len(values), "median": round(float(np.median(values)), 4), "highest": round(max(values), 4)}


def _request(config: AuditConfig, images: Images, shards: ShardFolder) -> dict[str, Any]:
    """All that the report depends on."""
    learned = hashlib.sha256(json.dumps([images.data.records[i].key for i in images.learned.indices]).encode())
    return {
        "samples": shards.index["request"],
        "training": {"dataset": images.facts["dataset"], "keys_sha256": learned.hexdigest(), "size": images.size},
        "false_alarms": config.false_alarms,
    }


def _draw(pairs: list[tuple[np.ndarray, np.ndarray, dict[str, Any]]], threshold: float, path: Path) -> None:
    """Pairs of (synthetic, training image), each with its row, four rows of five pairs."""
    rows = -(-len(pairs) // 5)
    figure = Figure(figsize=(14, 1.75 * rows + 0.6), layout="constrained", dpi=110)
    axes = figure.subplots(rows, 10, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for number, (synthetic, real, row) in enumerate(pairs):
        left, right = axes.flat[2 * number], axes.flat[2 * number + 1]
        left.imshow(synthetic, cmap="gray", vmin=0, vmax=255)
        right.imshow(real, cmap="gray", vmin=0, vmax=255)
        number_and_likeness = f"{row['key'].removeprefix('synthetic-')}: {row['likeness']:.2f}"
        left.set_title(number_and_likeness, fontsize=8, color="#c0281c" if row["near_copy"] else "black")
        right.set_title(row["nearest"], fontsize=8)
    figure.suptitle(
        "Synthetic image, turned to match, and the training image that it is most alike; "
        f"red: a near-copy (likeness over {threshold:.2f})",
        fontsize=10,
    )
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png")
