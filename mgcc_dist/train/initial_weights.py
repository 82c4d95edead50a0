"""Weights that a run starts from: where they are, and how its result names them."""

import logging
from collections.abc import Mapping
from pathlib import Path

from mgcc_dist.common.errors import UserError, did_you_mean
from mgcc_dist.common.files import sha256_of

WEIGHTS = "model.safetensors"
AUXILIARY = "auxiliary.safetensors"
"""of a model folder: the auxiliary decoders, if it has them"""
MODEL = "model.json"
"""of a model folder: what it is, and the sha256 of its weights"""
ZOO = Path(__file__).parents[1] / "zoo"
"""folder of the models that come with the package"""

logger = logging.getLogger(__name__)


def shipped_models() -> dict[str, Path]:
    """Return the folders of the models that come with the package, by name."""
    return {path.parent.name: path.parent for path in sorted(ZOO.glob(f"*/{WEIGHTS}"))}


def find_weights(source: Path, which: str) -> Path:
    """Return the weights file `source`, or that of the run folder `source` (in its subfolder `which`: best, last).

    `source` may also be the subfolder itself, a model folder, or the name of a shipped model.

    Raises:
        UserError: it does not exist.
    """
    candidates = (source, source / which / WEIGHTS, source / WEIGHTS)
    if path := next((path for path in candidates if path.is_file()), None):
        return path
    shipped = shipped_models()
    if folder := shipped.get(str(source)):
        return folder / WEIGHTS
    if source.is_dir():
        raise UserError(f"{source / which / WEIGHTS}: does not exist. Is {source} the folder of a finished run?")
    names = f", or a shipped model ({', '.join(shipped)})" if shipped else ""
    hint = did_you_mean(str(source), shipped)
    raise UserError(f"{source}: does not exist.{hint} Name the folder of a run or model, or its {WEIGHTS}{names}.")


def existing_weights(source: str | None, which: str) -> list[Path]:
    """Return the weights file that `init` names; none if it names none, or if the file no longer exists."""
    try:
        return [find_weights(Path(source), which)] if source else []
    except UserError:  # a run that has a checkpoint does not need it
        return []


def log_initial_weights(path: Path) -> None:
    logger.info("starting from %s (sha256 %s)", path, sha256_of(path)[:12])


def describe_initial_weights(init: str | None, inputs: Mapping[str, str]) -> dict[str, str] | None:
    """Describe the weights that a run started from, for result.json; None without `init`.

    `inputs` are its input files with their sha256. Those of `init` come before other weights.
    """
    for path, sha256 in inputs.items() if init else ():
        if Path(path).suffix == Path(WEIGHTS).suffix:
            return {"weights": path, "sha256": sha256}
    return None
