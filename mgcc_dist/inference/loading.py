"""A trained segmentation network from its file: `best/model.safetensors` says in its header what network it is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import nn

from mgcc_dist.common.errors import UserError
from mgcc_dist.methods.config import MethodConfig
from mgcc_dist.methods.registry import build
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.train.checkpoints import HEADER


def header(method: MethodConfig, network: NetworkConfig, image_size: int) -> dict[str, Any]:
    """What `load_predictor` must know to build the network again; stands in the file's header."""
    return {"method": asdict(method), "network": asdict(network), "image_size": image_size}


def load_predictor(run: Path, weights: Literal["best", "last"] = "best") -> tuple[nn.Module, int]:
    """The network of a run folder, in evaluation mode on the CPU, and the image size it was trained at.

    The network maps images [B,1,H,W] in [-1,1] to logits [B,1,H,W].

    Raises:
        UserError: no such file, or it does not hold a network of this package.
    """
    path = run / weights / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is not there; is {run} the folder of a segmentation run?")
    return load_network(path)


def load_network(path: Path) -> tuple[nn.Module, int]:
    """The same of one file, wherever it lies.

    Raises:
        UserError: the file does not hold a network of this package.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()[HEADER])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        # JSON has no tuples.
        network: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["network"].items()}
        predictor = build(MethodConfig(**facts["method"]), NetworkConfig(**network)).predictor()
        predictor.load_state_dict(state)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not hold a segmentation network ({error})") from error
    return predictor.eval(), facts["image_size"]
