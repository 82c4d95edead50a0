"""Start a run from trained weights: `mgcc segment --init RUN`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mgcc_dist.common.config import as_plain
from mgcc_dist.common.errors import UserError
from mgcc_dist.inference.loading import read_weights
from mgcc_dist.methods.method import Method
from mgcc_dist.models.config import EncoderDecoderConfig, NetworkConfig
from mgcc_dist.train.initial_weights import find_weights, log_initial_weights


def load_initial_weights(method: Method, source: Path, config: NetworkConfig) -> None:
    """Load the network that another run trained into `method`, whose network is `config`.

    Raises:
        UserError: there is no such network, or it has other tensors than this run's.
    """
    path = find_weights(source, "best")
    header, state = read_weights(path)
    _check_tensors(path, header["network"], state, method.predictor(), config)
    method.initialize(state)
    log_initial_weights(path)


def with_saved_encoder(config: NetworkConfig, init: str | None) -> NetworkConfig:
    """Return `config` with the architecture of its encoder, if `init` was trained with it: all weights are there."""
    if init is None or not isinstance(config, EncoderDecoderConfig) or config.encoder is None:
        return config
    try:
        there = read_weights(find_weights(Path(init), "best"))[0]["network"]
    except UserError:  # which `load_initial_weights` reports; a run that has a checkpoint does not need it
        return config
    return replace(config, encoder_config=there["encoder_config"]) if there.get("encoder") == config.encoder else config


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
