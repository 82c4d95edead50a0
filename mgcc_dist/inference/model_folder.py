"""Model folders: a trained network as a few small files, to ship, push or hand on.

    model.safetensors       the network; convolution weights in float16, BN and biases in float32
    auxiliary.safetensors   the auxiliary decoders, if it was exported with them
    calibration.json        its temperature, if one was fitted
    model.json              what it is, how it was trained, and the sha256 of its weights
    README.md               model card

A model folder is read as the folder of a run is. Nothing in it is unpickled.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mgcc_dist.common.config import flatten, read_layer
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import (
    create_folder,
    link,
    read_versioned,
    scratch_folder,
    sha256_of,
    write_json,
    write_text,
)
from mgcc_dist.common.migration import with_version
from mgcc_dist.evaluation.temperature import CALIBRATION, copy_temperature
from mgcc_dist.inference.config import ExportConfig
from mgcc_dist.inference.loading import (
    FACTS,
    FORMAT,
    VERSION,
    load_network,
    read_header,
    read_weights,
    run_info,
    verify_hash,
)
from mgcc_dist.inference.uncertainty import auxiliary_weights, load_with_auxiliary
from mgcc_dist.train.initial_weights import AUXILIARY, MODEL, WEIGHTS, find_weights
from mgcc_dist.train.weights_file import save_weights

logger = logging.getLogger(__name__)
CARD = "README.md"
FILES = (WEIGHTS, AUXILIARY, CALIBRATION, CARD, MODEL)
HEADER_KEYS = ("method", "network", "image_size", "fit")
OF_A_MACHINE = ("out", "kernels")
"""keys of a run's config that say nothing about its result"""
Card = Callable[[Path, tuple[Path, ...]], str]
"""renders the card of a model folder, with the scores of evaluations"""


def export_model(config: ExportConfig, card: Card) -> None:
    """Write the network of a run, or of a model folder, as a model folder.

    Raises:
        UserError: no such run or evaluation; the folder exists and holds something else; or the run's auxiliary
            decoders are asked for and it has none.
    """
    if config.out.suffix == Path(WEIGHTS).suffix or config.out.is_file():
        raise UserError(f"--out {config.out}: --to safetensors writes a folder. Name a folder.")
    weights = find_weights(config.run, config.weights)
    load_network(weights)
    auxiliary = _auxiliary(weights) if config.decoders else None
    with scratch_folder(config.out) as scratch:
        folder = scratch / config.out.resolve().name
        _write(folder, weights, config, auxiliary)
        _add_temperature(folder, weights, config.out)
        kept = None if config.evaluations else _card_of(weights, sha256_of(folder / WEIGHTS))
        write_text(folder / CARD, kept or card(folder, config.evaluations))
        if _is_same(folder, config.out):
            logger.info("export: %s is up to date", config.out)
            return
        _check_replaceable(config)
        create_folder(config.out)
        for name in FILES:
            if (folder / name).is_file():
                link(folder / name, config.out / name)
            else:
                (config.out / name).unlink(missing_ok=True)
    size = sum(path.stat().st_size for path in config.out.iterdir()) / 1e6
    logger.info("export: %s -> %s (%.1f MB)", weights, config.out, size)


def verify_model(folder: Path) -> dict[str, Any]:
    """Check that a model folder from elsewhere is complete and unchanged, and return its `run_info`.

    Raises:
        UserError: a file is absent, damaged, or not the one that model.json describes.
    """
    path = folder / WEIGHTS
    for name in (WEIGHTS, MODEL):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}, so it is not a model folder of mgcc-dist")
    content = read_model(folder)
    verify_hash(path, sha256_of(path), content)
    for name in content["files"]:
        if name not in (WEIGHTS, AUXILIARY) or not (folder / name).is_file():
            raise UserError(f"{folder}: its {MODEL} names {name!r}, which is absent. Get the model folder again.")
    if (folder / AUXILIARY).is_file():
        verify_hash(folder / AUXILIARY, sha256_of(folder / AUXILIARY), content)
    network, _ = load_network(path)
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
        raise UserError(f"{path}: has weights that are not finite. Train the network again.")
    return run_info(path)


def read_model(folder: Path) -> dict[str, Any]:
    """Read model.json.

    Raises:
        UserError: it is absent or damaged.
    """
    return read_versioned(folder / MODEL, FORMAT, VERSION, "Get the model folder again.")


def in_half_precision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert convolution weights to float16, where none of them overflows. BN and biases stay as they are."""
    converted = {}
    for name, tensor in state.items():
        half = tensor.half() if tensor.ndim > 1 else tensor
        converted[name] = half if half.isfinite().all() else tensor
    return converted


def _auxiliary(weights: Path) -> dict[str, Tensor]:
    return auxiliary_weights(load_with_auxiliary(weights, "--decoders", "Leave out --decoders."))


def _write(folder: Path, weights: Path, config: ExportConfig, auxiliary: dict[str, Tensor] | None) -> None:
    """Write weights and model.json."""
    _, state = read_weights(weights)
    header = read_header(weights)
    kept = with_version({key: header[key] for key in HEADER_KEYS if key in header})
    save_weights(in_half_precision(state), folder / WEIGHTS, kept)
    names = [WEIGHTS]
    if auxiliary is not None:
        save_weights(in_half_precision(auxiliary), folder / AUXILIARY)
        names.append(AUXILIARY)
    info = run_info(weights)
    earlier = read_model(weights.parent) if (weights.parent / MODEL).is_file() else {}
    facts = {key: _without_paths(info[key]) for key in FACTS if info.get(key) is not None}
    trained_on = f", trained on {facts['dataset']} (split {facts['split']})" if "dataset" in facts else ""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "name": folder.name,
        "summary": f"{info['network']['name']} by method {info['method']}, {info['image_size']} pixels{trained_on}",
        **{key: info[key] for key in ("method", "network", "image_size", "fit")},
        **facts,
        "step": header.get("step", earlier.get("step")),
        "training": earlier.get("training") or _training(weights),
        "run": earlier.get("run") or {"weights": config.weights, "weights_sha256": info["weights_sha256"]},
        "files": {name: sha256_of(folder / name) for name in names},
        "use": "research use only; not a medical device",
    }
    write_json(folder / MODEL, content)


def _training(weights: Path) -> dict[str, Any]:
    """Return the config of the run by dotted keys."""
    path = weights.parent.parent / "config.yaml"
    keys = flatten(read_layer(path).tree) if path.is_file() else {}
    return {key: _without_paths(value) for key, value in keys.items() if key not in OF_A_MACHINE}


def _without_paths(value: Any) -> Any:
    """Return what JSON holds with absolute paths, which belong to one machine, cut to their last part."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _add_temperature(folder: Path, weights: Path, existing: Path) -> None:
    """Keep the temperature that was fitted for the exported weights, else take that of the run."""
    for source, path in ((folder / WEIGHTS, existing / WEIGHTS), (weights, weights)):
        if copy_temperature(path.with_name(CALIBRATION), sha256_of(source), folder / WEIGHTS):
            return


def _card_of(weights: Path, sha256: str) -> str | None:
    """Return the card of the exported model folder, whose scores hold for the same weights; None for a run."""
    path = weights.with_name(CARD)
    if not path.is_file() or not weights.with_name(MODEL).is_file() or sha256_of(weights) != sha256:
        return None
    return path.read_text(encoding="utf-8")


def _is_same(folder: Path, existing: Path) -> bool:
    """Whether `existing` has the files of `folder`, and no other of FILES."""

    def content(path: Path) -> bytes | None:
        return path.read_bytes() if path.is_file() else None

    return all(content(folder / name) == content(existing / name) for name in FILES)


def _check_replaceable(config: ExportConfig) -> None:
    """Raise UserError if `out` has files that are not those of a model folder, or may not be replaced."""
    names = sorted(path.name for path in config.out.iterdir()) if config.out.is_dir() else []
    if foreign := [name for name in names if name not in FILES and not name.startswith(".")]:
        raise UserError(f"--out {config.out}: holds {foreign[0]!r} and is not a model folder. Choose another --out.")
    if any(name in FILES for name in names) and not config.overwrite:
        raise UserError(f"--out {config.out}: exists and is not this export. Choose another, or use --overwrite.")
