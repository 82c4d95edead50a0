"""Start a run from trained weights: `mgcc segment --init RUN`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mgcc_dist.common.config import as_plain
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.inference.loading import WEIGHTS, read_weights, weights_file
from mgcc_dist.methods.method import Method
from mgcc_dist.models.config import NetworkConfig

logger = logging.getLogger(__name__)


def load_initial_weights(method: Method, source: Path, config: NetworkConfig) -> None:
    """Load the network that another run trained into `method`, whose network is `config`.

    Raises:
        UserError: there is no such network, or it has other tensors than this run's.
    """
    path = weights_file(source)
    header, state = read_weights(path)
    _check_tensors(path, header["network"], state, method.predictor(), config)
    method.initialize(state)
    logger.info("segment: starting from %s (sha256 %s)", path, sha256_of(path)[:12])


def existing_weights(source: str | None) -> list[Path]:
    """Return the weights file that `init` names; none if it names none, or if the file no longer exists."""
    try:
        return [weights_file(Path(source))] if source else []
    except UserError:  # a run that has a checkpoint does not need it
        return []


def describe_initial_weights(inputs: Mapping[str, str]) -> dict[str, str] | None:
    """Describe the weights that a run started from, for result.json; `inputs` are its input files with their sha256."""
    for path, sha256 in inputs.items():
        if Path(path).suffix == Path(WEIGHTS).suffix:
            return {"weights": path, "sha256": sha256}
    return None


def _check_tensors(
    path: Path, there: dict[str, Any], state: dict[str, Tensor], network: nn.Module, config: NetworkConfig
) -> None:
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    differing = [name for name in [*expected, *found] if expected.get(name) != found.get(name)]
    if not differing:
        return
    here = as_plain(config)
    keys = [key for key in here if there.get(key) != here[key]]
    if "name" in keys or not keys:
        keys = keys and ["name"]
    name = differing[0]
    causes = [f"network.{key} is {there.get(key)} there and {here[key]} here" for key in keys] or [
        f"{name} is {found.get(name, 'absent')} there and {expected.get(name, 'absent')} here"
    ]
    raise UserError(f"init: {path} holds another network: {', '.join(causes)}. Use equal settings, or another run.")
