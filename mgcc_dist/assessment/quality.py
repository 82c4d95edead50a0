"""Quality of the synthetic images: FID, KID, precision, recall, density, coverage and spectral distance to validation
images.

Six metrics compare two sets of feature vectors (see features.py), real x_1..x_N and synthetic y_1..y_M:

- FID (Heusel et al. 2017): Frechet distance between two Gaussians with the means and covariances of the sets. FID is
  biased upwards for few images, more so in more dimensions. Only values for equal numbers of images are comparable.
- KID (Binkowski et al. 2018): unbiased estimate of the squared MMD with the kernel (x.y / D + 1)^3; may be negative.
- Precision, recall (Kynkaanniemi et al. 2019): share of synthetic images inside the k-NN balls of the real ones, and of
  real images inside the k-NN balls of the synthetic ones. A ball extends from an image to its k-th neighbor in its own
  set.
- Density, coverage (Naeem et al. 2020): number of real balls that contain a synthetic image, divided by k (1 for real
  images), and share of real balls that contain at least one synthetic image.

The spectral distance compares the images themselves: the root mean square difference in dB between the mean radial log
power spectra of the sets (evaluation/spectra.py). It shows a blur that features may overlook.

The scale of these values depends on the features and on the number of images. The report therefore includes a floor:
the same metrics for one half of the validation images against the other half, the best that any generator can reach.
Compare it with the column for equally many synthetic images against the same halves. Both are means over random
halves. Images of a group (patient) stay together, except where the halves meet.

The 95 % interval of a metric is 1.96 standard errors either way, cut off at the ends of its range. The standard error
is the standard deviation over the halves: this is a bootstrap with halves drawn without replacement, in which an
estimate from half of the images varies as much as the estimate from all images does. Drawing with replacement would put
copies among the nearest neighbors. If there are more synthetic than real images, the halves are limited by the real
ones and the interval is conservative.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from tabulate import tabulate

from mgcc_dist.assessment.config import QualityConfig
from mgcc_dist.assessment.constant_images import refuse_constant_images
from mgcc_dist.assessment.features import FeatureExtractor, load
from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import write_json, write_text
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.evaluation.sample_metrics import LOWER, METRICS
from mgcc_dist.evaluation.spectra import extract_spectra, spectral_distance
from mgcc_dist.evaluation.statistics import grouped_permutation

BATCH_SIZE = 16  # images loaded at a time
BLOCK_SIZE = 1024  # rows of the distance matrix computed at a time, to limit memory
RANGES = {
    "fid": (0, np.inf),
    "precision": (0, 1),
    "recall": (0, 1),
    "density": (0, np.inf),
    "coverage": (0, 1),
    "spectral_distance": (0, np.inf),
}
"""lowest and highest value; an unbiased KID may be negative"""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ImageSet:
    """Features [N,D] and radial log spectra [N,R] of N images."""

    features: Array
    spectra: Array

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, indices: NDArray[np.int64]) -> "ImageSet":
        return ImageSet(self.features[indices], self.spectra[indices])


def check_config(config: QualityConfig, images: ImageData, synthetic: int) -> None:
    """Check before training that the encoder works and that there will be enough images.

    Raises:
        UserError: the encoder does not exist or can't be used, or half of the images are too few for `neighbours`.
    """
    if config.encoder is not None:
        load(config.encoder, Path(), images.size).check()
    half = min(len(images.val), synthetic) // 2
    if config.enabled and half <= config.neighbours:
        smaller_k = f"--quality.neighbours {half - 1} or " if half > 1 else ""
        raise UserError(
            f"quality.neighbours: {config.neighbours} is too large for {len(images.val)} validation and {synthetic} "
            f"synthetic images, because half of them are only {half} images. Pass {smaller_k}--quality.enabled false."
        )


def evaluate(
    config: QualityConfig,
    extractor: FeatureExtractor,
    images: ImageData,
    samples: Path,
    folder: Path,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Write `quality.json` and `quality.md` to `folder` and return the report. Collective."""
    shards = ShardFolder.open(samples, verify=False)
    check_config(config, images, len(shards))
    refuse_constant_images(shards, accelerator)
    real, synthetic = (
        ImageSet(extractor.extract(dataset, accelerator), extract_spectra(loader, accelerator))
        for dataset, loader in (
            (images.val, images.val_loader(BATCH_SIZE, accelerator)),
            (shards, images.eval_loader(shards, BATCH_SIZE, accelerator)),
        )
    )
    groups = [images.shards.records[i].group for i in images.val.indices]
    report = {
        "request": _request(config, extractor, images, shards),
        "features": extractor.info | {"dimensions": real.features.shape[1]},
        "neighbours": config.neighbours,
        **metrics_with_intervals(real, synthetic, groups, config.neighbours, config.halves),
    }
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            write_json(folder / "quality.json", report)
            write_text(folder / "quality.md", markdown_report(report))
    return report


def metrics_with_intervals(
    real: ImageSet, synthetic: ImageSet, groups: list[str], k: int, halves: int
) -> dict[str, Any]:
    """Return all metrics of the images `real`, which belong to `groups`, and `synthetic`."""
    generator = np.random.default_rng(0)
    half = min(len(real), len(synthetic)) // 2
    synthetic_halves, real_halves = [], []
    for _ in range(halves):
        order = grouped_permutation(groups, generator)
        first, second = real[order[:half]], real[order[-half:]]
        real_halves.append(compute_metrics(first, second, k))
        subset = synthetic[generator.permutation(len(synthetic))[:half]]
        synthetic_halves.append(compute_metrics(first, subset, k))
    full = compute_metrics(real, synthetic, k)
    return {
        "images": {"real": len(real), "synthetic": len(synthetic), "half": half},
        "synthetic": {name: _interval(name, synthetic_halves, full[name]) for name in METRICS},
        "synthetic_halves": {name: _interval(name, synthetic_halves) for name in METRICS},
        "real_halves": {name: _interval(name, real_halves) for name in METRICS},
    }


def compute_metrics(real: ImageSet, synthetic: ImageSet, k: int) -> dict[str, float]:
    """Return the METRICS of two sets of images, with k nearest neighbors."""
    x, y = real.features, synthetic.features
    return {
        "fid": fid(x, y),
        "kid": kid(x, y),
        **prdc(x, y, k),
        "spectral_distance": spectral_distance(real.spectra, synthetic.spectra),
    }


def fid(real: Array, synthetic: Array) -> float:
    """Return |mean_x - mean_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)).

    With S = A^T A, the eigenvalues of S_x S_y are the squared singular values of A_x A_y^T, so the last trace is the
    sum of these singular values. Unlike a matrix square root (MONAI, torchmetrics), this is accurate without full rank
    and fast if there are fewer images than dimensions.
    """
    x, y = _covariance_factor(real), _covariance_factor(synthetic)
    mean_distance = ((real.mean(axis=0) - synthetic.mean(axis=0)) ** 2).sum()
    root_trace = np.linalg.svdvals(x @ y.T).sum()
    return float(mean_distance + (x**2).sum() + (y**2).sum() - 2 * root_trace)


def _covariance_factor(features: Array) -> Array:
    """Return A [at most D,D] such that A^T A is the covariance of `features` [N,D]."""
    centered = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centered, mode="r")) if len(centered) > centered.shape[1] else centered


def kid(real: Array, synthetic: Array) -> float:
    """Return mean k(x, x') over distinct pairs + mean k(y, y') over distinct pairs - 2 mean k(x, y)."""

    def kernel(a: Array, b: Array) -> Array:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_distinct_pairs(a: Array) -> float:
        gram = kernel(a, a)
        return (gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1))

    within = mean_of_distinct_pairs(real) + mean_of_distinct_pairs(synthetic)
    return float(within - 2 * kernel(real, synthetic).mean())


def prdc(real: Array, synthetic: Array, k: int) -> dict[str, float]:
    """Return precision, recall, density and coverage; the border of a ball belongs to the ball."""
    real_radii, synthetic_radii = knn_radii(real, k), knn_radii(synthetic, k)
    in_real_ball, ball_count = 0, 0  # synthetic images in any real ball; pairs of synthetic image and real ball
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for start in range(0, len(synthetic), BLOCK_SIZE):
        distances = cdist(synthetic[start : start + BLOCK_SIZE], real)
        inside = distances <= real_radii
        ball_count += int(inside.sum())
        in_real_ball += int(inside.any(axis=1).sum())
        covered |= inside.any(axis=0)
        recalled |= (distances <= synthetic_radii[start : start + BLOCK_SIZE, None]).any(axis=0)
    return {
        "precision": in_real_ball / len(synthetic),
        "recall": float(recalled.mean()),
        "density": ball_count / (k * len(synthetic)),
        "coverage": float(covered.mean()),
    }


def knn_radii(features: Array, k: int) -> Array:
    """Return the distance [N] from each of `features` [N,D] to its k-th nearest neighbor."""
    blocks = [cdist(features[start : start + BLOCK_SIZE], features) for start in range(0, len(features), BLOCK_SIZE)]
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for block in blocks])  # index 0 is the image itself


def markdown_report(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    images, features = report["images"], report["features"]
    real, synthetic, half = images["real"], images["synthetic"], images["half"]
    headers = [
        "metric",
        "better",
        f"{synthetic} synthetic / {real} real",
        f"{half} synthetic / {half} real",
        f"{half} real / {half} real",
    ]
    rows = []
    for name in METRICS:
        values = [_format(report[column][name]) for column in ("synthetic", "synthetic_halves", "real_halves")]
        rows.append([LOWER.get(name, name), "lower" if name in LOWER else "higher", *values])
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return (
        f"{table}\n\n"
        f"Features: {features['kind']} ({features['file']}), {features['dimensions']} dimensions, images of "
        f"{features['image_size']}x{features['image_size']} pixels. Real images are the validation images; k = "
        f"{report['neighbours']}; 95 % intervals from random halves. The last column is the floor: compare it with the "
        "one before it. FID is biased upwards for few images, so values for other numbers of images, or for other "
        "features, are not comparable.\n"
    )


def _format(metric: dict[str, float]) -> str:
    return f"{metric['value']:.3g} ({metric['low']:.3g} to {metric['high']:.3g})"


def _interval(name: str, halves: list[dict[str, float]], value: float | None = None) -> dict[str, float]:
    """Return `value`, by default the mean over `halves`, with its 95 % interval within the range of metric `name`."""
    values = [row[name] for row in halves]
    center = float(np.mean(values)) if value is None else value
    margin = 1.96 * float(np.std(values))
    lowest, highest = RANGES.get(name, (-np.inf, np.inf))
    return {"value": center, "low": max(lowest, center - margin), "high": min(highest, center + margin)}


def _request(
    config: QualityConfig, extractor: FeatureExtractor, images: ImageData, shards: ShardFolder
) -> dict[str, Any]:
    """Return everything that the report depends on."""
    return {
        "samples": shards.index["request"],
        "dropped": shards.index.get("dropped", []),
        "val": images.info,
        "features": {key: extractor.info[key] for key in ("kind", "sha256", "image_size")},
        "neighbours": config.neighbours,
        "halves": config.halves,
        "metrics": list(METRICS),
    }
