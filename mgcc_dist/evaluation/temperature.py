"""Temperature scaling (Guo et al. 2017): one number T per weights file, p -> sigmoid(logit(p) / T).

T minimizes the negative log-likelihood of the pixels of the validation images, every image with the same weight. It is
stored as `calibration.json` next to the weights. It does not move a probability across 0.5, so masks stay as they are.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_versioned, sha256_of, write_json
from mgcc_dist.evaluation.calibration import BINS, Array

FORMAT = "mgcc-dist calibration"
VERSION = 1
CALIBRATION = "calibration.json"
LIMIT = 17.0
"""logits are clipped here; the float32 probability next to 1 has a logit of 16.6"""
WIDTH = 0.05
"""of the bins of logits"""
CENTRES = np.arange(-LIMIT + WIDTH / 2, LIMIT, WIDTH)
RANGE = (0.05, 20.0)
"""of the temperatures that are searched"""


@dataclass(frozen=True)
class BeforeAfter:
    before: float
    after: float


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature, and what it changed on the images it was fitted on."""

    temperature: float
    images: int
    nll: BeforeAfter
    """mean negative log-likelihood of a pixel, in nats"""
    ece: BeforeAfter


def calibrate(probability: np.ndarray, temperature: float) -> np.ndarray:
    """Return sigmoid(logit(p) / T) of `probability` float [...] in [0,1], in the same dtype."""
    if temperature == 1:
        return probability
    return expit(_logits(probability) / probability.dtype.type(temperature))


def logit_histogram(probability: np.ndarray, truth: np.ndarray) -> Array:
    """Count the pixels of one image by logit: float64 [2,bins], shares of all pixels, row 0 background, row 1 lesion.

    `probability` is float [H,W] in [0,1], `truth` bool [H,W].
    """
    index = ((_logits(probability.ravel()) + LIMIT) / WIDTH).astype(int).clip(0, len(CENTRES) - 1)
    lesion = truth.ravel()
    counts = [np.bincount(index[lesion == row], minlength=len(CENTRES)) for row in (False, True)]
    return np.stack(counts) / lesion.size


def fit_temperature(histograms: Sequence[Array]) -> Temperature:
    """Fit the temperature to the `logit_histogram` of each image.

    Logits count as the centres of their bins, and ECE is that of calibration.py, from the same bins of logits.
    """
    from scipy.optimize import minimize_scalar  # half a second, and predictions don't fit

    shares = np.mean(histograms, axis=0)
    best = minimize_scalar(lambda x: _nll(shares, np.exp(x)), bounds=np.log(RANGE), method="bounded")
    temperature = float(np.exp(best.x))
    return Temperature(
        temperature,
        len(histograms),
        BeforeAfter(_nll(shares, 1.0), _nll(shares, temperature)),
        BeforeAfter(_ece(shares, 1.0), _ece(shares, temperature)),
    )


def write_temperature(fitted: Temperature, weights: Path, sha256: str, split: str) -> Path:
    """Write `calibration.json` next to the weights file, whose hash is `sha256`; return its path."""
    path = weights.parent / CALIBRATION
    start = {"format": FORMAT, "version": VERSION, "weights_sha256": sha256, "split": split}
    write_json(path, start | asdict(fitted))
    return path


def copy_temperature(source: Path, sha256: str, weights: Path) -> bool:
    """Copy a `calibration.json` next to `weights`, the same network in another file.

    Returns whether `source` exists and was fitted for weights of the hash `sha256`.

    Raises:
        UserError: it is damaged.
    """
    if not source.is_file():
        return False
    content = read_versioned(source, FORMAT, VERSION, "Move it elsewhere, or fit it again.")
    if content.get("weights_sha256") != sha256:
        return False
    write_json(weights.with_name(CALIBRATION), content | {"weights_sha256": sha256_of(weights)})
    return True


def read_temperature(info: dict[str, Any]) -> float:
    """Return the temperature that was fitted for the weights that `run_info` describes.

    Raises:
        UserError: none was fitted, the file is damaged, or it was fitted for other weights.
    """
    path = Path(info["weights"]).parent / CALIBRATION
    remedy = "Fit it by `mgcc evaluate --fit-temperature` on the validation images."
    if not path.is_file():
        raise UserError(f"--calibrated: {path} does not exist. {remedy}")
    content = read_versioned(path, FORMAT, VERSION, remedy)
    if content.get("weights_sha256") != info["weights_sha256"]:
        raise UserError(f"--calibrated: {path} was fitted for other weights than {info['weights']}. {remedy}")
    temperature = content.get("temperature")
    if not isinstance(temperature, float) or not RANGE[0] / 2 < temperature < RANGE[1] * 2:
        raise UserError(f"--calibrated: {path} has temperature {temperature!r}. {remedy}")
    return temperature


def _logits(probability: np.ndarray) -> np.ndarray:
    return logit(probability.clip(0, 1)).clip(-LIMIT, LIMIT)  # resizing can exceed 1 by rounding


def _nll(shares: Array, temperature: float) -> float:
    scaled = CENTRES / temperature
    background, lesion = shares
    return float(background @ np.logaddexp(0, scaled) + lesion @ np.logaddexp(0, -scaled))


def _ece(shares: Array, temperature: float) -> float:
    probability = expit(CENTRES / temperature)
    bin_of = np.minimum((probability * BINS).astype(int), BINS - 1)
    error = shares.sum(axis=0) * probability - shares[1]
    return float(np.abs(np.bincount(bin_of, error, BINS)).sum())
