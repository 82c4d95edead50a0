"""Does the model copy its training images? Every synthetic image beside the training image that it is most alike.

Alike in pixels, and in the features of a network where one is named (similarity.py says how). What is too alike is
learned from the real images: for each of them (300 at most) the highest similarity with a training image of another
group, that is of another patient or, where patients are unknown, not a near-duplicate. The thresholds are the
similarities that a share of `false_alarms` of them exceeds, half of it in either way where there are two. A synthetic
image above one of them is listed as a near-copy: it is more like one patient's image than real images of different
patients are. docs/explanation/audit.md says what is found by that.

`audit.json` has thresholds, near-copies and, for every image, its nearest; `closest.png` shows the twenty pairs that
are closest in pixels, `closest_features.png` those in features. With `drop_copies` the near-copies are taken out of
the shards.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from mgcc_dist.assessment.config import AuditConfig
from mgcc_dist.assessment.features import Features
from mgcc_dist.assessment.similarity import FeatureSimilarity, align, describe, similarities
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_json, replacing, write_json
from mgcc_dist.data.augment import symmetry
from mgcc_dist.data.duplicates import thumbnail
from mgcc_dist.data.images import resize_image
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.selection import drop
from mgcc_dist.data.sources import Source, Subset
from mgcc_dist.diffusion.images import Images

CALIBRATION = 300  # real images
PAIRS = 20  # in the picture
BLOCK = 16  # images compared at a time, to bound memory


def is_finished(config: AuditConfig, features: Features | None, images: Images, samples: Path, folder: Path) -> bool:
    """Whether `folder` holds the audit of these samples, and its near-copies are dropped where they are to be."""
    path = folder / "audit.json"
    shards = ShardFolder.open(samples, verify=False)
    if not path.is_file() or read_json(path)["request"] != _request(config, features, images, shards):
        return False
    return not config.drop_copies or shards.index.get("dropped") is not None


def audit(
    config: AuditConfig,
    features: Features | None,
    images: Images,
    samples: Path,
    folder: Path,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Leave `audit.json` and the pictures in `folder`, and return the first. Collective.

    Without `features` images are compared in pixels alone.
    """
    shards = ShardFolder.open(samples, verify=False)
    data, learned = images.data, images.learned.indices
    reals = np.random.default_rng(0).permutation(learned + images.unseen.indices)[:CALIBRATION].tolist()
    allowed = config.false_alarms / (2 if features else 1)
    pixels = _in_pixels(images, shards, reals, allowed, accelerator)
    rows: list[dict[str, Any]] = [
        {
            "key": record.key,
            "nearest": data.records[learned[j]].key,
            "similarity": round(value, 4),
            "alignment": describe(alignment),
            "near_copy": value > pixels.threshold,
        }
        for record, (value, j, alignment) in zip(shards.records, pixels.nearest, strict=True)
    ]
    report = {"request": _request(config, features, images, shards), **pixels.facts}
    if features:
        alike = _in_features(features, images, shards, reals, allowed, accelerator)
        for row, (value, j, _) in zip(rows, alike.nearest, strict=True):
            row["features"] = {"nearest": data.records[learned[j]].key, "similarity": round(value, 4)}
            row["near_copy"] = row["near_copy"] or value > alike.threshold
        report["features"] = features.facts | alike.facts
    copies = [row["key"] for row in rows if row["near_copy"]]
    report |= {"near_copies": copies, "images": rows}
    if accelerator.is_main_process:
        square = partial(_square, size=images.size)
        pairs = [(align(square(shards, i), turn), square(data, learned[j]), rows[i]) for i, j, turn in pixels.closest()]
        _draw(pairs, pixels.threshold, folder / "closest.png")
        if features:
            pairs = [
                (square(shards, i), symmetry(square(data, learned[j]), turn), rows[i] | rows[i]["features"])
                for i, j, turn in alike.closest()
            ]
            _draw(pairs, alike.threshold, folder / "closest_features.png")
        write_json(folder / "audit.json", report)
        if config.drop_copies:
            drop(samples, copies)
    accelerator.wait_for_everyone()
    return report


@dataclass(frozen=True)
class _Compared:
    """What one way of comparing says of real images and those of other groups, and of synthetic and training ones."""

    floor: list[float]
    """the highest similarity of each real image"""
    allowed: float
    """share of these that is over the threshold"""
    nearest: list[tuple[float, int, int]]
    """of each synthetic image: similarity, number and alignment of the training image that it is most alike"""

    @property
    def threshold(self) -> float:
        return float(np.quantile(self.floor, 1 - self.allowed))

    @property
    def facts(self) -> dict[str, Any]:
        """What audit.json says of it."""
        values = [value for value, _, _ in self.nearest]
        return {"threshold": round(self.threshold, 4), "real": _summary(self.floor), "synthetic": _summary(values)}

    def closest(self) -> list[tuple[int, int, int]]:
        """The PAIRS that are most alike: numbers of the synthetic and the training image, and the alignment."""
        order = sorted(range(len(self.nearest)), key=lambda i: -self.nearest[i][0])[:PAIRS]
        return [(i, *self.nearest[i][1:]) for i in order]


def _in_pixels(
    images: Images, shards: ShardFolder, reals: list[int], allowed: float, accelerator: Accelerator
) -> _Compared:
    data, size = images.data, images.size
    thumbnails = torch.from_numpy(np.stack([thumbnail(_square(data, i, size)) for i in images.learned.indices]))
    thumbnails = thumbnails.to(accelerator.device)
    floor = []
    for i in reals[accelerator.process_index :: accelerator.num_processes]:
        similarity, _ = similarities([_square(data, i, size)], thumbnails)
        floor += [(i, value) for value in _with_other_groups(images, [i], similarity.numpy())]
    highest = [value for _, value in sorted(gather_object(floor))]
    return _Compared(_any(highest), allowed, _nearest(shards, thumbnails, size, accelerator))


def _in_features(
    features: Features, images: Images, shards: ShardFolder, reals: list[int], allowed: float, accelerator: Accelerator
) -> _Compared:
    similarity = FeatureSimilarity(features, images.learned, accelerator)
    among_reals, _ = similarity.of(Subset(images.data, reals))
    floor = _any(_with_other_groups(images, reals, among_reals))
    of_synthetic, views = similarity.of(shards)
    best = of_synthetic.argmax(axis=1)
    nearest = [(float(row[j]), int(j), int(view[j])) for row, view, j in zip(of_synthetic, views, best, strict=True)]
    return _Compared(floor, allowed, nearest)


def _with_other_groups(images: Images, reals: list[int], similarity: NDArray[Any]) -> list[float]:
    """The highest of each row of `similarity` [R,N], of real images with training ones, among those of other groups."""
    records = images.data.records
    groups = np.array([records[i].group for i in images.learned.indices])
    others = (row[groups != records[i].group] for i, row in zip(reals, similarity, strict=True))
    return [float(row.max()) for row in others if len(row)]


def _any(floor: list[float]) -> list[float]:
    if not floor:
        raise UserError(
            "audit: all images are of one group, so there is nothing to compare with; --audit.enabled false"
        )
    return floor


def _nearest(
    shards: ShardFolder, thumbnails: Tensor, size: int, accelerator: Accelerator
) -> list[tuple[float, int, int]]:
    """For each synthetic image: similarity, number and alignment of the training image that it is most alike."""
    mine = list(range(len(shards)))[accelerator.process_index :: accelerator.num_processes]
    found = []
    for start in range(0, len(mine), BLOCK):
        block = mine[start : start + BLOCK]
        similarity, alignment = similarities([_square(shards, i, size) for i in block], thumbnails)
        best, nearest = similarity.max(dim=1)
        chosen = alignment.gather(1, nearest[:, None])[:, 0]
        found += list(zip(block, best.tolist(), nearest.tolist(), chosen.tolist(), strict=True))
    return [(value, j, which) for _, value, j, which in sorted(gather_object(found))]


def _square(source: Source, i: int, size: int) -> np.ndarray:
    """The image [S,S] as the model saw it."""
    return resize_image(source.read(i).image, size, size)


def _summary(values: list[float]) -> dict[str, float]:
    return {"images": len(values), "median": round(float(np.median(values)), 4), "highest": round(max(values), 4)}


def _request(config: AuditConfig, features: Features | None, images: Images, shards: ShardFolder) -> dict[str, Any]:
    """All that the report depends on."""
    learned = hashlib.sha256(json.dumps([images.data.records[i].key for i in images.learned.indices]).encode())
    return {
        "samples": shards.index["request"],
        "training": {"dataset": images.facts["dataset"], "keys_sha256": learned.hexdigest(), "size": images.size},
        "features": {key: features.facts[key] for key in ("kind", "sha256", "image_size")} if features else None,
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
        number_and_similarity = f"{row['key'].removeprefix('synthetic-')}: {row['similarity']:.2f}"
        left.set_title(number_and_similarity, fontsize=8, color="#c0281c" if row["similarity"] > threshold else "black")
        right.set_title(row["nearest"], fontsize=8)
    figure.suptitle(
        "Synthetic image and the training image that it is most alike, one of them turned to match the other; "
        f"red: a near-copy (similarity over {threshold:.2f})",
        fontsize=10,
    )
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png")
