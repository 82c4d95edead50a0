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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from mgcc_dist.assessment.pair_audit import KINDS, PairSimilarity, values, with_contour
from mgcc_dist.assessment.similarity import FeatureSimilarity, apply_alignment, describe_alignment, pixel_similarity
from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import replacing, write_json
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.data.augment import symmetry
from mgcc_dist.data.datasets import SampleDataset
from mgcc_dist.data.duplicates import thumbnail
from mgcc_dist.data.images import resize_image
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
    real, train = images.shards, images.train.indices
    calibration = np.random.default_rng(0).permutation([*train, *images.val.indices])[:CALIBRATION_IMAGES].tolist()
    has_pairs = any(record.labeled for record in shards.records)
    false_alarms = config.false_alarms / (1 + bool(extractor) + len(KINDS) * has_pairs)
    pixels = _compare_pixels(images, shards, calibration, false_alarms, accelerator)
    rows: list[dict[str, Any]] = [
        {
            "key": record.key,
            "nearest": real.records[train[j]].key,
            "similarity": round(value, 4),
            "alignment": describe_alignment(alignment),
            "near_copy": value > pixels.threshold,
        }
        for record, (value, j, alignment) in zip(shards.records, pixels.nearest, strict=True)
    ]
    report = {"request": _request(config, extractor, images, shards), **pixels.summary()}
    if extractor:
        features = _compare_features(extractor, images, shards, calibration, false_alarms, accelerator)
        for row, (value, j, _) in zip(rows, features.nearest, strict=True):
            row["features"] = {"nearest": real.records[train[j]].key, "similarity": round(value, 4)}
            row["near_copy"] = row["near_copy"] or value > features.threshold
        report["features"] = extractor.info | features.summary()
    if has_pairs:
        similarity = PairSimilarity(images, accelerator)
        highest, matches = similarity.highest_across_groups(calibration), similarity.nearest(shards, range(len(shards)))
        for kind in KINDS:
            compared = _Comparison(
                _require_any(values(highest, kind)), false_alarms, [match[kind] for match in matches if match]
            )
            report[kind] = compared.summary()
            for row, match in zip(rows, matches, strict=True):
                if match:
                    row[kind] = {
                        "nearest": real.records[train[match[kind].train_index]].key,
                        "similarity": round(match[kind].similarity, 4),
                        "alignment": describe_alignment(match[kind].alignment),
                    }
                    row["near_copy"] = row["near_copy"] or match[kind].similarity > compared.threshold
    copies = [row["key"] for row in rows if row["near_copy"]]
    report |= {"near_copies": copies, "images": rows}
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            read_square = partial(_read_square, size=images.size)
            rule = describe_thresholds(report)
            pairs = [
                (apply_alignment(read_square(shards, i), alignment), read_square(real, train[j]), rows[i])
                for i, j, alignment in pixels.closest()
            ]
            _save(draw_pairs(pairs, rule), folder / "closest.png")
            if extractor:
                pairs = [
                    (
                        read_square(shards, i),
                        symmetry(read_square(real, train[j]), symmetry_index),
                        rows[i] | rows[i]["features"],
                    )
                    for i, j, symmetry_index in features.closest()
                ]
                _save(draw_pairs(pairs, rule), folder / "closest_features.png")
            if has_pairs:
                for kind in KINDS:
                    found = [(i, match[kind]) for i, match in enumerate(matches) if match]
                    found = sorted(found, key=lambda each: -each[1].similarity)[:SHOWN_PAIRS]
                    pairs = [
                        (
                            apply_alignment(with_contour(shards[i], images.size), match.alignment),
                            with_contour(images.train[match.train_index], images.size),
                            rows[i] | rows[i][kind],
                        )
                        for i, match in found
                    ]
                    _save(draw_pairs(pairs, rule), folder / f"closest_{kind}.png")
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
    nearest: Sequence[tuple[float, int, int]]
    """per synthetic image: similarity with its nearest training image, index of that image, alignment"""

    @property
    def threshold(self) -> float:
        return float(np.quantile(self.calibration, 1 - self.false_alarms))

    def summary(self) -> dict[str, Any]:
        """Return the entries for audit.json."""
        values = [value for value, _, _ in self.nearest]
        return {
            "threshold": round(self.threshold, 4),
            "real": _summarize(self.calibration),
            "synthetic": _summarize(values),
        }

    def closest(self) -> list[tuple[int, int, int]]:
        """Return the most similar pairs: index of the synthetic image, index of the training image, alignment."""
        order = sorted(range(len(self.nearest)), key=lambda i: -self.nearest[i][0])[:SHOWN_PAIRS]
        return [(i, *self.nearest[i][1:]) for i in order]


def _compare_pixels(
    images: ImageData, shards: ShardFolder, calibration: list[int], false_alarms: float, accelerator: Accelerator
) -> _Comparison:
    real, size = images.shards, images.size
    squares = (_read_square(real, i, size) for i in images.train.indices)
    thumbnails = torch.from_numpy(np.stack([thumbnail(square) for square in squares])).to(accelerator.device)
    rows = []
    for i in calibration[accelerator.process_index :: accelerator.num_processes]:
        similarity, _ = pixel_similarity([_read_square(real, i, size)], thumbnails)
        rows += [(i, value) for value in _highest_across_groups(images, [i], similarity.numpy())]
    highest = [value for _, value in sorted(gather_object(rows))]
    return _Comparison(_require_any(highest), false_alarms, _nearest_in_pixels(shards, thumbnails, size, accelerator))


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
    nearest = [(float(row[j]), int(j), int(view[j])) for row, view, j in zip(of_synthetic, views, best, strict=True)]
    return _Comparison(highest, false_alarms, nearest)


def _highest_across_groups(images: ImageData, indices: list[int], similarity: NDArray[Any]) -> list[float]:
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


def _nearest_in_pixels(
    shards: ShardFolder, thumbnails: Tensor, size: int, accelerator: Accelerator
) -> list[tuple[float, int, int]]:
    """Return, per synthetic image, similarity, index and alignment of the nearest training image."""
    assigned = list(range(len(shards)))[accelerator.process_index :: accelerator.num_processes]
    rows = []
    with ProgressBar(len(shards), "comparing with training images", "images", share=len(assigned)) as bar:
        for start in range(0, len(assigned), BLOCK_SIZE):
            block = assigned[start : start + BLOCK_SIZE]
            similarity, alignment = pixel_similarity([_read_square(shards, i, size) for i in block], thumbnails)
            best, nearest = similarity.max(dim=1)
            best_alignment = alignment.gather(1, nearest[:, None])[:, 0]
            rows += list(zip(block, best.tolist(), nearest.tolist(), best_alignment.tolist(), strict=True))
            bar.update(len(block))
    return [(value, j, alignment) for _, value, j, alignment in sorted(gather_object(rows))]


def _read_square(dataset: SampleDataset, i: int, size: int) -> np.ndarray:
    """Return the image [S,S] as the model sees it."""
    return resize_image(dataset[i].image, size, size)


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
