"""A trained segmentation network from its file: `best/model.safetensors` says in its header what network it is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from torch import nn

from mgcc_dist.errors import UserError
from mgcc_dist.methods import MethodConfig, build
from mgcc_dist.models import NetworkConfig


def header(method: MethodConfig, network: NetworkConfig, image_size: int) -> dict[str, str]:
    """What `load_predictor` must know to build the network again, as safetensors metadata."""
    facts = {"method": asdict(method), "network": asdict(network), "image_size": image_size}
    return {key: json.dumps(value) for key, value in facts.items()}


def load_predictor(run: Path, weights: Literal["best", "last"] = "best") -> tuple[nn.Module, int]:
    """The network of a run folder, in evaluation mode on the CPU, and the image size it was trained at.

    The network maps images [B,1,H,W] in [-1,1] to logits [B,1,H,W].

    Raises:
        UserError: no such file, or it does not hold a network of this package.
    """
    path = run / weights / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is not there; is {run} the folder of a segmentation run?")
    try:
        with safe_open(path, framework="pt") as file:
            facts = {key: json.loads(file.metadata()[key]) for key in ("method", "network", "image_size")}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        network = NetworkConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in facts["network"].items()})
        predictor = build(MethodConfig(**facts["method"]), network).predictor()
        predictor.load_state_dict(state)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not hold a segmentation network ({error})") from error
    return predictor.eval(), facts["image_size"]
