"""Read a trained segmentation network: the header of `best/model.safetensors` says which network it is."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mgcc_dist.common.config import Layer, as_plain, resolve
from mgcc_dist.common.errors import UserError, reason_of
from mgcc_dist.common.files import read_versioned, sha256_of
from mgcc_dist.common.migration import current, with_version
from mgcc_dist.data.geometry import Fit
from mgcc_dist.methods.config import MethodConfig
from mgcc_dist.methods.method import Method, build
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.train.initial_weights import MODEL, find_weights
from mgcc_dist.train.saved_run import is_finished, read_result
from mgcc_dist.train.weights_file import HEADER

FORMAT = "mgcc-dist model"
VERSION = 1
FACTS = ("dataset", "split", "seed", "images", "synthetic", "init", "scores", "commit")
"""what `run_info` knows of a finished run, and of a model folder"""


@dataclass(frozen=True)
class Trained:
    """What a header says about the network."""

    method: MethodConfig
    network: NetworkConfig


def header(method: MethodConfig, network: NetworkConfig, image_size: int, fit: Fit = "stretch") -> dict[str, Any]:
    """The header of a weights file: what rebuilds the network, and how images become its input."""
    return with_version(as_plain(Trained(method, network)) | {"image_size": image_size, "fit": fit})


def load_predictor(run: Path, weights: Literal["best", "last"] = "best") -> tuple[nn.Module, int]:
    """Load the network of a run folder, in evaluation mode on the CPU, and the image size it was trained at.

    The network maps images [B,1,H,W] in [-1,1] to logits [B,1,H,W].

    Raises:
        UserError: no such file, or it does not hold a network of this package.
    """
    return load_network(find_weights(run, weights))


def load_network(path: Path) -> tuple[nn.Module, int]:
    """Load the network of one weights file, in evaluation mode on the CPU, and the image size it was trained at.

    Raises:
        UserError: the file does not hold a network of this package.
    """
    content, state = read_weights(path)
    try:
        predictor = build_method(path).predictor()
        predictor.load_state_dict(state)
        return predictor.eval(), content["image_size"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _no_network(path, error) from error


def build_method(path: Path) -> Method:
    """Build the method that the header of the weights file `path` names, with freshly initialised networks.

    Raises:
        UserError: the file does not hold a network of this package.
    """
    try:
        content = read_header(path)
    except (SafetensorError, ValueError) as error:
        raise _no_network(path, error) from error
    trained = resolve(Trained, [Layer({key: content[key] for key in ("method", "network")}, str(path))])
    return build(trained.method, trained.network)


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header of a weights file and its state dict.

    Raises:
        OSError: the file can't be read.
        UserError: it does not hold a segmentation network.
    """
    try:
        content = read_header(path)
        return {key: content[key] for key in ("method", "network", "image_size")}, load_file(path)
    except (SafetensorError, ValueError) as error:
        raise _no_network(path, error) from error


def _no_network(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: does not hold a segmentation network ({reason_of(error)})")


def run_info(path: Path) -> dict[str, Any]:
    """What is known of the weights file `path`: its header, and of a finished run its data, scores and commit.

    Keys: `weights`, `weights_sha256`, `method`, `network`, `image_size`, `fit`; with the run's result.json two folders
    up, or model.json next to it, also `dataset`, `split`, `seed`, `images` (counts), `synthetic`, `init`, `scores`
    (mean validation scores of these weights) and `commit`.

    Raises:
        UserError: result.json or model.json is damaged, or model.json is of other weights.
    """
    content = read_header(path)
    info = {"weights": str(path), "weights_sha256": sha256_of(path), "method": content["method"]["name"]}
    network = {key: value for key, value in content["network"].items() if key != "encoder_config"}  # long
    info |= {"network": network, "image_size": content["image_size"]}
    info["fit"] = content.get("fit", "stretch")  # version 0.1 had no other
    if (path.parent / MODEL).is_file():
        model = read_versioned(path.parent / MODEL, FORMAT, VERSION, "Get the model folder again.")
        verify_hash(path, info["weights_sha256"], model)
        return info | {key: model.get(key) for key in FACTS}
    run, weights = path.parent.parent, path.parent.name
    if weights not in ("best", "last") or not is_finished(run):
        return info
    result = read_result(run)
    known = result | {"scores": result.get(weights, {}).get("summary")}
    known["commit"] = result.get("environment", {}).get("commit")
    return info | {key: known.get(key) for key in FACTS}


def verify_hash(path: Path, sha256: str, model: dict[str, Any]) -> None:
    """Check that `sha256` is what the content `model` of model.json says of its neighbour `path`.

    Raises:
        UserError: it is not.
    """
    files = model.get("files")
    if not isinstance(files, dict) or files.get(path.name) != sha256:
        raise UserError(f"{path}: is not the file that {MODEL} next to it describes. Get the model folder again.")


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of a weights file.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not a weights file of this package, or its header is damaged.
    """
    path.open("rb").close()  # safetensors says of a file without read permission that it does not exist
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if HEADER not in metadata:
        raise ValueError("not written by mgcc-dist")
    content = current(json.loads(metadata[HEADER]), str(path))
    size, fit = content.get("image_size"), content.get("fit", "stretch")
    if not all(isinstance(content.get(key), dict) and "name" in content[key] for key in ("method", "network")):
        raise ValueError("its header has no method or no network")
    if not isinstance(size, int) or size < 1 or fit not in get_args(Fit):
        raise ValueError(f"its header has image_size {size!r} and fit {fit!r}")
    return content
