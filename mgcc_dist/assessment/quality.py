"""How good are the synthetic images? FID, KID, precision, recall, density, coverage against held-out real images.

All six compare two sets of feature vectors (features.py says of what), real x_1..x_N and synthetic y_1..y_M:

- FID (Heusel et al. 2017): Frechet distance of the two Gaussians that have the sets' means and covariances. It is
  biased: of few images it is too high, more so for more dimensions, so only figures of equal numbers compare.
- KID (Binkowski et al. 2018): squared MMD under the kernel (x.y / D + 1)^3, the unbiased estimate; may be below 0.
- precision, recall (Kynkaanniemi et al. 2019): share of synthetic images within the k-NN balls of the real ones, and
  of real images within those of the synthetic ones. A ball reaches from an image to its k-th neighbour in its own set.
- density, coverage (Naeem et al. 2020): number of real balls that a synthetic image lies in, over k (1 is what real
  images have); share of real balls with a synthetic image in them.

What 0.3 means depends on features and numbers. So the same figures are given for one half of the held-out images
against the other, the best that any generator could reach, and beside them for as many synthetic images against the
same halves: these two compare. Both are means over random halves, which keep a group (a patient) on one side.

The interval of a figure is 1.96 standard errors either way; the standard error is its scatter over these halves (a
bootstrap of halves drawn without replacement, in which the scatter of an estimate from half of the images is that of
the estimate from all of them). Drawing with replacement would put copies among the nearest neighbours. Where there are
more synthetic than real images the halves are as small as the real ones, and the interval rather too wide.
"""

from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from mgcc_dist.assessment.config import QualityConfig
from mgcc_dist.assessment.features import Features, locate
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_json, write_json, write_text
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.diffusion.images import Images

BLOCK = 1024  # rows of a distance matrix at a time, to bound memory
FIGURES = ("fid", "kid", "precision", "recall", "density", "coverage")
Array = NDArray[np.float64]


def check(config: QualityConfig, images: Images, synthetic: int) -> None:
    """Before hours of training: is the encoder there, and will there be enough images?

    Raises:
        UserError: it is not, or halves of the images have no `neighbours`-th neighbour.
    """
    if config.encoder is not None:
        locate(config.encoder)
    half = min(len(images.unseen), synthetic) // 2
    if config.enabled and half <= config.neighbours:
        fewer = f"--quality.neighbours {half - 1}, or " if half > 1 else ""
        raise UserError(
            f"quality: halves of {len(images.unseen)} held-out and {synthetic} synthetic images are {half} images, in "
            f"which there is no neighbour number {config.neighbours}; {fewer}--quality.enabled false"
        )


def is_finished(config: QualityConfig, features: Features, images: Images, samples: Path, folder: Path) -> bool:
    path = folder / "quality.json"
    request = _request(config, features, images, ShardFolder.open(samples, verify=False))
    return path.is_file() and read_json(path)["request"] == request


def measure(
    config: QualityConfig, features: Features, images: Images, samples: Path, folder: Path, accelerator: Accelerator
) -> dict[str, Any]:
    """Leave `quality.json` and `quality.md` in `folder`, and return the first. Collective."""
    shards = ShardFolder.open(samples, verify=False)
    check(config, images, len(shards))
    real, synthetic = features.of(images.unseen, accelerator), features.of(shards, accelerator)
    groups = [images.data.records[i].group for i in images.unseen.indices]
    report = {
        "request": _request(config, features, images, shards),
        "features": features.facts | {"dimensions": real.shape[1]},
        "neighbours": config.neighbours,
        **compare(real, synthetic, groups, config.neighbours, config.halves),
    }
    if accelerator.is_main_process:
        write_json(folder / "quality.json", report)
        write_text(folder / "quality.md", table(report))
    accelerator.wait_for_everyone()
    return report


def compare(real: Array, synthetic: Array, groups: list[str], k: int, halves: int) -> dict[str, Any]:
    """All figures of features real [N,D], whose images are of `groups`, and synthetic [M,D]."""
    generator = np.random.default_rng(0)
    half = min(len(real), len(synthetic)) // 2
    of_synthetic, of_real = [], []
    for _ in range(halves):
        order = _by_group(groups, generator)
        one, other = real[order[:half]], real[order[-half:]]
        of_real.append(_figures(one, other, k))
        of_synthetic.append(_figures(one, synthetic[generator.permutation(len(synthetic))[:half]], k))
    whole = _figures(real, synthetic, k)
    return {
        "images": {"real": len(real), "synthetic": len(synthetic), "half": half},
        "synthetic": {name: _interval(whole[name], [one[name] for one in of_synthetic]) for name in FIGURES},
        "synthetic_halves": {name: _interval(None, [one[name] for one in of_synthetic]) for name in FIGURES},
        "real_halves": {name: _interval(None, [one[name] for one in of_real]) for name in FIGURES},
    }


def _figures(real: Array, synthetic: Array, k: int) -> dict[str, float]:
    return {"fid": fid(real, synthetic), "kid": kid(real, synthetic), **neighbourhoods(real, synthetic, k)}


def fid(real: Array, synthetic: Array) -> float:
    """|mean_x - mean_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)).

    With S = A^T A the eigenvalues of S_x S_y are the squared singular values of A_x A_y^T, whose sum is the last trace.
    That needs no root of a matrix and no full rank, and is quick where there are fewer images than dimensions.
    """
    x, y = (_root(features) for features in (real, synthetic))
    between = ((real.mean(axis=0) - synthetic.mean(axis=0)) ** 2).sum()
    overlap = np.linalg.svdvals(x @ y.T).sum()
    return float(between + (x**2).sum() + (y**2).sum() - 2 * overlap)


def _root(features: Array) -> Array:
    """A [at most D,D] with A^T A the covariance of `features` [N,D]."""
    centred = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(centred) > centred.shape[1] else centred


def kid(real: Array, synthetic: Array) -> float:
    """Mean kernel of distinct real pairs and of distinct synthetic pairs, less twice that of mixed pairs."""

    def kernel(a: Array, b: Array) -> Array:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def distinct(a: Array) -> float:
        among = kernel(a, a)
        return (among.sum() - np.trace(among)) / (len(a) * (len(a) - 1))

    return float(distinct(real) + distinct(synthetic) - 2 * kernel(real, synthetic).mean())


def neighbourhoods(real: Array, synthetic: Array, k: int) -> dict[str, float]:
    """Precision, recall, density, coverage; an image on the rim of a ball lies in it."""
    real_radii, synthetic_radii = radii(real, k), radii(synthetic, k)
    inside, recalled, covered = 0, np.zeros(len(real), bool), np.zeros(len(real), bool)
    precise = 0
    for start in range(0, len(synthetic), BLOCK):
        distances = cdist(synthetic[start : start + BLOCK], real)
        within = distances <= real_radii
        inside += int(within.sum())
        precise += int(within.any(axis=1).sum())
        covered |= within.any(axis=0)
        recalled |= (distances <= synthetic_radii[start : start + BLOCK, None]).any(axis=0)
    return {
        "precision": precise / len(synthetic),
        "recall": float(recalled.mean()),
        "density": inside / (k * len(synthetic)),
        "coverage": float(covered.mean()),
    }


def radii(features: Array, k: int) -> Array:
    """Distance [N] of each of `features` [N,D] to its k-th neighbour among the others."""
    blocks = [cdist(features[start : start + BLOCK], features) for start in range(0, len(features), BLOCK)]
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for block in blocks])  # the 0th is the image itself


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    images, features = report["images"], report["features"]
    lines = [
        f"| figure | better | {images['synthetic']} synthetic / {images['real']} real | {images['half']} synthetic / "
        f"{images['half']} real | {images['half']} real / {images['half']} real |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in FIGURES:
        cells = [_cell(report[column][name]) for column in ("synthetic", "synthetic_halves", "real_halves")]
        better = "lower" if name in ("fid", "kid") else "higher"
        lines.append(f"| {name.upper() if name in ('fid', 'kid') else name} | {better} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Features: {features['kind']} ({features['file']}), {features['dimensions']} dimensions, images of "
            f"{features['image_size']} pixels a side. Real images are the held-out ones; k = {report['neighbours']}; "
            "95 % intervals from random halves. The last column is the floor: compare it with the one before it. FID "
            "of few images is too high, so figures of other numbers of images, or of other features, do not compare.",
            "",
        ]
    )


def _cell(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3g} ({figure['low']:.3g} to {figure['high']:.3g})"


def _interval(value: float | None, halves: list[float]) -> dict[str, float]:
    """`value`, or the mean over `halves`, with its 95 % interval."""
    middle = float(np.mean(halves)) if value is None else value
    reach = 1.96 * float(np.std(halves))
    return {"value": middle, "low": middle - reach, "high": middle + reach}


def _by_group(groups: list[str], generator: np.random.Generator) -> NDArray[np.int64]:
    """A random order in which the images of a group are neighbours."""
    names, group = np.unique(groups, return_inverse=True)
    return np.lexsort((generator.permutation(len(groups)), generator.permutation(len(names))[group]))


def _request(config: QualityConfig, features: Features, images: Images, shards: ShardFolder) -> dict[str, Any]:
    """All that the report depends on."""
    return {
        "samples": shards.index["request"],
        "dropped": shards.index.get("dropped", []),
        "held_out": images.facts,
        "features": {key: features.facts[key] for key in ("kind", "sha256", "image_size")},
        "neighbours": config.neighbours,
        "halves": config.halves,
    }
