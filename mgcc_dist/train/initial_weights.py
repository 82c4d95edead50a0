"""Weights that a run starts from: where they are, and how its result names them."""

import logging
from collections.abc import Mapping
from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of

WEIGHTS = "model.safetensors"

logger = logging.getLogger(__name__)


def find_weights(source: Path, which: str) -> Path:
    """Return the weights file `source`, or that of the run folder `source` (in its subfolder `which`: best, last).

    `source` may also be the subfolder itself.

    Raises:
        UserError: it does not exist.
    """
    candidates = (source, source / which / WEIGHTS, source / WEIGHTS)
    if path := next((path for path in candidates if path.is_file()), None):
        return path
    if source.is_dir():
        raise UserError(f"{source / which / WEIGHTS}: does not exist. Is {source} the folder of a finished run?")
    raise UserError(f"{source}: does not exist. Name the folder of a run, or its {WEIGHTS}.")


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
