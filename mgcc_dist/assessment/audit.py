"""Memorization audit: search the synthetic images for near-copies of training images.

Every synthetic image is compared with all training images, in pixels and, if `quality.encoder` names a trained network,
also in features (similarity.py). The thresholds are calibrated on real images. For up to 300 of them, the audit takes
the highest similarity with a training image of another group, that is, of another patient or, if patients are unknown,
outside its set of near-duplicates. A threshold is the quantile of these values that a share of `false_alarms` exceeds.
That share is divided among the parts that are compared: pixels, features and, of samples with masks, the masks and the
pairs of image and mask (pair_audit.py). A synthetic image above a threshold is listed as a near-copy: it is more
similar to one training image than real images of different patients are to each other. See docs/explanation/audit.md
for what this finds and what it misses.

`audit.json` has the thresholds, the near-copies and the nearest training image of every synthetic image. `closest.png`
shows the twenty most similar pairs in pixels, `closest_features.png`, `closest_masks.png` and `closest_pairs.png` those
of the other parts. With `drop_copies` a further stage removes the near-copies from the shards.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset

from mgcc_dist.assessment.config import AuditConfig
from mgcc_dist.assessment.constant_images import refuse_constant_images
from mgcc_dist.assessment.features import FeatureExtractor
from mgcc_dist.assessment.pair_audit import KINDS, Match, PairSimilarity, with_contour
from mgcc_dist.assessment.similarity import (
    FeatureSimilarity,
    apply_alignment,
    as_square,
    describe_alignment,
    pixel_similarity,
)
from mgcc_dist.common.distributed import gather_by_index, raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import replacing, write_json
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.data.augment import symmetry
from mgcc_dist.data.datasets import SampleDataset
from mgcc_dist.data.duplicates import thumbnail
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.diffusion.images import ImageData

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AUDIT_FORMAT = 2  # of audit.json; an audit in another format is repeated
CALIBRATION_IMAGES = 300
SHOWN_PAIRS = 20
NEAR_COPY_COLOR = "#c0281c"
BLOCK_SIZE = 16  # synthetic images compared at a time, to limit memory


def check_config(config: AuditConfig, images: ImageData) -> None:
    """Check before training that the thresholds can be calibrated.

    Raises:
        UserError: all images belong to one group.
    """
    records = images.shards.records
    if config.enabled and len({records[i].group for i in (*images.train.indices, *images.val.indices)}) == 1:
        _require_any([])


def audit(
    config: AuditConfig,
    extractor: FeatureExtractor | None,
    images: ImageData,
    samples: Path,
    folder: Path,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Write `audit.json` and the pictures to `folder` and return the report. Collective.

    Without `extractor` images are compared in pixels only.
    """
    shards = ShardFolder.open(samples, verify=False)
    refuse_constant_images(shards, accelerator)
    train = images.train.indices
    calibration = np.random.default_rng(0).permutation([*train, *images.val.indices])[:CALIBRATION_IMAGES].tolist()
    has_pairs = any(record.labeled for record in shards.records)
    false_alarms = config.false_alarms / (1 + bool(extractor) + len(KINDS) * has_pairs)
    parts = {"pixels": _compare_pixels(images, shards, calibration, false_alarms, accelerator)}
    if extractor:
        parts["features"] = _compare_features(extractor, images, shards, calibration, false_alarms, accelerator)
    if has_pairs:
        parts |= _compare_pairs(images, shards, calibration, false_alarms, accelerator)

    rows = _rows(parts, images, shards)
    report = {"request": _request(config, extractor, images, shards), **parts["pixels"].summary()}
    report |= {name: part.summary() for name, part in parts.items() if name != "pixels"}
    if extractor:
        report["features"] = extractor.info | report["features"]
    report |= {"near_copies": [row["key"] for row in rows if row["near_copy"]], "images": rows}
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            for name, part in parts.items():
                figure = draw_pairs(_closest_pairs(name, part, images, shards, rows), describe_thresholds(report))
                _save(figure, folder / ("closest.png" if name == "pixels" else f"closest_{name}.png"))
            write_json(folder / "audit.json", report)
    return report


def describe_thresholds(report: dict[str, Any]) -> str:
    """Say above which similarities a report lists near-copies."""
    others = [f" or {report[part]['threshold']:.2f} in {part}" for part in ("features", *KINDS) if part in report]
    return f"similarity above {report['threshold']:.2f}{' in pixels' * bool(others)}{''.join(others)}"


@dataclass(frozen=True)
class _Comparison:
    """Similarities in pixels, in features, of masks or of pairs."""

    calibration: list[float]
    """highest similarity of each calibration image with a training image of another group"""
    false_alarms: float
    """share of these above the threshold"""
    nearest: Sequence[Match | None]
    """match of each synthetic image, in features with the symmetry of the training image; None if it has no lesion"""

    @property
    def threshold(self) -> float:
        return float(np.quantile(self.calibration, 1 - self.false_alarms))

    def summary(self) -> dict[str, Any]:
        """Return the entries for audit.json."""
        return {
            "threshold": round(self.threshold, 4),
            "real": _summarize(self.calibration),
            "synthetic": _summarize([match.similarity for match in self.nearest if match]),
        }

    def closest(self) -> list[tuple[int, Match]]:
        """Return the matches of the highest similarity, each with the index of its synthetic image."""
        found = [(i, match) for i, match in enumerate(self.nearest) if match]
        return sorted(found, key=lambda each: -each[1].similarity)[:SHOWN_PAIRS]


def _compare_pixels(
    images: ImageData, shards: ShardFolder, calibration: list[int], false_alarms: float, accelerator: Accelerator
) -> _Comparison:
    squares = (as_square(images.train[i], images.size) for i in range(len(images.train)))
    thumbnails = torch.from_numpy(np.stack([thumbnail(square) for square in squares])).to(accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    highest: list[float] = []
    for block, similarity, _ in _pixel_blocks(images.shards, calibration[rank::world], images.size, thumbnails):
        highest += _highest_across_groups(images, block, similarity.numpy())
    rows: list[tuple[int, Match]] = []
    mine = range(len(shards))[rank::world]
    with ProgressBar(len(shards), "comparing with training images", "images", share=len(mine)) as bar:
        for block, similarity, alignment in _pixel_blocks(shards, mine, images.size, thumbnails):
            best, nearest = similarity.max(dim=1)
            best_alignment = alignment.gather(1, nearest[:, None])[:, 0]
            found = map(Match, best.tolist(), nearest.tolist(), best_alignment.tolist())
            rows += list(zip(block, found, strict=True))
            bar.update(len(block))
    nearest_images = gather_by_index(rows)
    return _Comparison(_require_any(gather_object(highest)), false_alarms, nearest_images)


def _pixel_blocks(
    dataset: SampleDataset, indices: Sequence[int], size: int, thumbnails: Tensor
) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    """Yield up to BLOCK_SIZE of `indices`, with similarity and alignment [B,N] of these images to `thumbnails`."""
    for start in range(0, len(indices), BLOCK_SIZE):
        block = indices[start : start + BLOCK_SIZE]
        yield block, *pixel_similarity([as_square(dataset[i], size) for i in block], thumbnails)


def _compare_features(
    extractor: FeatureExtractor,
    images: ImageData,
    shards: ShardFolder,
    calibration: list[int],
    false_alarms: float,
    accelerator: Accelerator,
) -> _Comparison:
    similarity = FeatureSimilarity(extractor, images.train, accelerator)
    of_real, _ = similarity.compare(Subset(images.shards, calibration))
    highest = _require_any(_highest_across_groups(images, calibration, of_real))
    of_synthetic, views = similarity.compare(shards)
    best = of_synthetic.argmax(axis=1)
    nearest = [
        Match(float(row[j]), int(j), int(view[j])) for row, view, j in zip(of_synthetic, views, best, strict=True)
    ]
    return _Comparison(highest, false_alarms, nearest)


def _compare_pairs(
    images: ImageData, shards: ShardFolder, calibration: list[int], false_alarms: float, accelerator: Accelerator
) -> dict[str, _Comparison]:
    """Compare masks, and pairs of image and mask."""
    similarity = PairSimilarity(images, accelerator)
    of_real = similarity.highest_across_groups(calibration)
    of_synthetic = similarity.nearest(shards, range(len(shards)))
    return {
        kind: _Comparison(
            _require_any([match[kind].similarity for match in of_real if match]),
            false_alarms,
            [match.get(kind) for match in of_synthetic],
        )
        for kind in KINDS
    }


def _rows(parts: Mapping[str, _Comparison], images: ImageData, shards: ShardFolder) -> list[dict[str, Any]]:
    """Return the entry of each synthetic image for audit.json."""
    thresholds = {name: part.threshold for name, part in parts.items()}
    rows = []
    for i, record in enumerate(shards.records):
        found: dict[str, dict[str, Any]] = {}
        near_copy = False
        for name, part in parts.items():
            if not (match := part.nearest[i]):
                continue
            near_copy = near_copy or match.similarity > thresholds[name]
            original = images.shards.records[images.train.indices[match.train_index]].key
            found[name] = {"nearest": original, "similarity": round(match.similarity, 4)}
            if name != "features":
                found[name]["alignment"] = describe_alignment(match.alignment)
        rows.append({"key": record.key, **found.pop("pixels"), "near_copy": near_copy, **found})
    return rows


def _closest_pairs(
    name: str, part: _Comparison, images: ImageData, shards: ShardFolder, rows: Sequence[dict[str, Any]]
) -> list[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    """Return the closest pairs of a part for `draw_pairs`, with contours of the masks where these are compared."""
    view = with_contour if name in KINDS else as_square
    pairs = []
    for i, match in part.closest():
        synthetic, real = view(shards[i], images.size), view(images.train[match.train_index], images.size)
        if name == "features":
            real = symmetry(real, match.alignment)
        else:
            synthetic = apply_alignment(synthetic, match.alignment)
        pairs.append((synthetic, real, rows[i] | rows[i].get(name, {})))
    return pairs


def _highest_across_groups(images: ImageData, indices: Sequence[int], similarity: NDArray[Any]) -> list[float]:
    """Return the highest similarity of each real image with a training image of another group.

    `similarity` [R,N] compares the real images `indices` with the training images.
    """
    records = images.shards.records
    groups = np.array([records[i].group for i in images.train.indices])
    others = (row[groups != records[i].group] for i, row in zip(indices, similarity, strict=True))
    return [float(row.max()) for row in others if len(row)]


def _require_any(values: list[float]) -> list[float]:
    if not values:
        raise UserError(
            "audit: all images belong to one group, so the threshold cannot be calibrated. Pass --audit.enabled false"
        )
    return values


def _summarize(values: list[float]) -> dict[str, float]:
    return {"images": len(values), "median": round(float(np.median(values)), 4), "highest": round(max(values), 4)}


def _request(
    config: AuditConfig, extractor: FeatureExtractor | None, images: ImageData, shards: ShardFolder
) -> dict[str, Any]:
    """Return everything that the report depends on."""
    keys = json.dumps([images.shards.records[i].key for i in images.train.indices])
    return {
        "format": AUDIT_FORMAT,
        "samples": shards.index["request"],
        "train": {
            "dataset": images.info["dataset"],
            "keys_sha256": hashlib.sha256(keys.encode()).hexdigest(),
            "size": images.size,
        },
        "features": {key: extractor.info[key] for key in ("kind", "sha256", "image_size")} if extractor else None,
        "false_alarms": config.false_alarms,
    }


def draw_pairs(pairs: list[tuple[np.ndarray, np.ndarray, dict[str, Any]]], rule: str) -> "Figure":
    """Draw pairs of (synthetic image, training image, its report row), five per row; `rule` defines a near-copy.

    The titles of the near-copies of the report are red, whether pixels or features decided.
    """
    from matplotlib.figure import Figure  # half a second to import, and most processes draw nothing

    rows = -(-len(pairs) // 5)
    figure = Figure(figsize=(14, 1.75 * rows + 0.6), layout="constrained", dpi=110)
    axes = figure.subplots(rows, 10, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for number, (synthetic, real, row) in enumerate(pairs):
        left, right = axes.flat[2 * number], axes.flat[2 * number + 1]
        left.imshow(synthetic, cmap="gray", vmin=0, vmax=255)
        right.imshow(real, cmap="gray", vmin=0, vmax=255)
        title = f"{row['key'].removeprefix('synthetic-')}: {row['similarity']:.2f}"
        left.set_title(title, fontsize=8, color=NEAR_COPY_COLOR if row["near_copy"] else "black")
        right.set_title(row["nearest"], fontsize=8)
    figure.suptitle(
        "Synthetic image and its most similar training image, one of them rotated or mirrored to match the other; "
        f"red: near-copy ({rule})",
        fontsize=10,
    )
    return figure


def _save(figure: "Figure", path: Path) -> None:
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png")
