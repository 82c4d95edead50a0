"""A network's weights from a safetensors file, and what the file's header says of them."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from mgcc_dist.common.errors import UserError
from mgcc_dist.train.checkpoints import HEADER


def load_weights(module: nn.Module, path: Path) -> dict[str, Any]:
    """Load the weights into `module`, and return what training wrote into the header (nothing for other files).

    Raises:
        UserError: no such file, a damaged one, or one of another architecture; names a tensor that does not fit.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there; run the stage that makes it, with the same --out")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
        weights = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete its folder and make it again") from error
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"{path} is of another architecture than its config: {name} is {theirs.get(name, 'absent')} there and "
            f"{ours.get(name, 'absent')} in the config (and {len(differing) - 1} more tensors differ)"
        )
    module.load_state_dict(weights)
    return header
