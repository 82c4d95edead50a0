"""Load a network's weights and the training metadata from a safetensors file."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.train.initial_weights import find_weights, log_initial_weights
from mgcc_dist.train.saved_run import has_checkpoint
from mgcc_dist.train.weights_file import HEADER


def load_initial_weights(network: nn.Module, source: str | None, folder: Path) -> None:
    """Load the weights that `init` names, if it does and the stage in `folder` has no checkpoint. Collective.

    Raises:
        UserError: there are no such weights, or they do not match the network's architecture.
    """
    if source and not has_checkpoint(folder):
        with raise_on_all_ranks():
            path = find_weights(Path(source), "last")
            load_weights(network, path)
            log_initial_weights(path)


def load_weights(module: nn.Module, path: Path) -> dict[str, Any]:
    """Load the weights into `module` and return the metadata that training saved with them (empty for other files).

    Raises:
        UserError: the file does not exist, is damaged, or does not match the module's architecture.
    """
    if not path.is_file():
        raise UserError(f"{path}: does not exist. Run the stage that creates it, with the same --out.")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
        weights = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(
            f"{path}: is damaged ({error}). Restore it, or move its folder elsewhere to train it again."
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    mismatched = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if mismatched:
        name = mismatched[0]
        raise UserError(
            f"{path}: does not match the configured architecture. {name} is {found.get(name, 'missing')} in the file "
            f"and {expected.get(name, 'missing')} in the config ({len(mismatched) - 1} more tensors differ)."
        )
    module.load_state_dict(weights)
    return header
