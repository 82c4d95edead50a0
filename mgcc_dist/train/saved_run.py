"""What a run folder says about its run. Does not import torch, so `mgcc slurm status` may use it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mgcc_dist.common.config import load, read_yaml
from mgcc_dist.common.errors import UserError, reason_of
from mgcc_dist.common.files import InvalidJson, read_json, sha256_of
from mgcc_dist.common.identity import differing_keys, input_keys, input_values
from mgcc_dist.data.records import INDEX
from mgcc_dist.data.remote import hash_file, is_url, join, shown
from mgcc_dist.data.splits import locate_split
from mgcc_dist.train.initial_weights import WEIGHTS

Config = TypeVar("Config")
CONTENT = (INDEX, WEIGHTS, f"best/{WEIGHTS}")
"""files that say what the folder of a data set, a pretrained encoder or a trained run holds"""
SECTIONS = ("best", "last", "environment", "inputs")
"""parts of result.json that are objects"""


def is_finished(folder: Path) -> bool:
    """Return whether the run in `folder` has its result."""
    return (folder / "result.json").is_file()


def saved_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of the complete checkpoints of the run in `folder`, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"))


def has_checkpoint(folder: Path) -> bool:
    """Return whether the run in `folder` has a checkpoint to resume from."""
    return bool(saved_checkpoints(folder))


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the newest checkpoint of the run in `folder`; None if it has none."""
    return max(saved_checkpoints(folder), default=None)


def read_result(folder: Path) -> dict[str, Any]:
    """Read result.json.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "result.json"
    reason: object = "no result in it"
    try:
        result = read_json(path)
        if isinstance(result, dict) and result and all(isinstance(result.get(key, {}), dict) for key in SECTIONS):
            return result
    except InvalidJson as error:
        reason = error.__cause__
    remedy = f"Move it elsewhere and rerun the run, which writes it again from {folder / 'checkpoints'}."
    raise UserError(f"{path}: is damaged ({reason}). {remedy}")


def read_config(folder: Path, config_class: type[Config]) -> Config:
    """Read config.yaml.

    Raises:
        UserError: it is damaged, or this version can't read it.
    """
    path = folder / "config.yaml"
    try:
        content = read_yaml(path.read_text(), "YAML")
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is damaged ({reason_of(error)}). Restore it, or choose another --out.") from error
    if not content:
        raise UserError(f"{path}: is damaged (no settings in it). Restore it, or choose another --out.")
    return load(config_class, path)


def differences(folder: Path, config: Any) -> list[tuple[str, Any, Any]]:
    """Return the keys in which `config` is another run than the one in `folder`: (key, value there, value here).

    Raises:
        UserError: the folder's config.yaml or result.json can't be read.
    """
    saved = read_config(folder, type(config))
    differing = differing_keys(saved, config)
    if not input_keys(config) & {key for key, _, _ in differing}:
        return differing
    return differing_keys(saved, config, _saved_hashes(folder, saved), _hash_values(config))


def _hash_values(config: Any) -> dict[str, str]:
    """Return the sha256 of the data that `config` names, by path or name; without data that does not exist."""
    hashes = {}
    for value in input_values(config):
        try:
            if is_url(value):
                hashes[value] = hash_file(join(value, INDEX))
                continue
            files = [Path(value) / name for name in CONTENT] if Path(value).is_dir() else [locate_split(value)]
        except UserError:  # does not exist, or can't be reached
            continue
        if file := next((file for file in files if file.is_file()), None):
            hashes[value] = sha256_of(file)
    return hashes


def _saved_hashes(folder: Path, config: Any) -> dict[str, str]:
    """Return the sha256 that was saved with the run for the data in its config, by path or name.

    Runs of version 0.1 have none.
    """
    by_file = _saved_inputs(folder)
    hashes = {}
    for value in input_values(config):
        files = (value, *(shown(join(value, name)) for name in CONTENT))
        shipped = (file for file in by_file if file.endswith(f"configs/splits/{value}.json"))
        if file := next((file for file in (*files, *shipped) if file in by_file), None):
            hashes[value] = by_file[file]
    return hashes


def _saved_inputs(folder: Path) -> Mapping[str, str]:
    if is_finished(folder):
        return read_result(folder).get("inputs", {})
    checkpoint = newest_checkpoint(folder)
    try:
        return read_json(checkpoint / "state.json").get("inputs", {}) if checkpoint else {}
    except InvalidJson:  # which loading the checkpoint reports
        return {}
