"""The run folder: `config.yaml` says what it is, `result.json` (written last) that it is finished."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

import mgcc_dist
from mgcc_dist.config import as_plain, save
from mgcc_dist.errors import UserError
from mgcc_dist.files import read_json, write_json

# Keys that change how a run is carried out but not what comes out of it.
FREE_KEYS = ("out", "data.workers", "kernels")


def claim(folder: Path, config: Any, accelerator: Accelerator) -> None:
    """Take `folder` for a run of `config` and save the config there; a folder of the same config is gone on with.

    A folder in which no checkpoint was saved yet is free: its run failed at the start, on wrong settings perhaps.

    Raises:
        UserError: the folder holds a run of another config; the message names a key that differs.
    """
    path = folder / "config.yaml"
    if path.is_file() and (is_finished(folder) or any(folder.glob("checkpoints/step-*"))):
        then, now = _flat(yaml.safe_load(path.read_text())), _flat(as_plain(config))
        differing = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
        differing = [key for key in differing if key not in FREE_KEYS]
        if differing:
            key = differing[0]
            more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
            raise UserError(
                f"{folder} holds a run with {key} = {then.get(key)}, not {now.get(key)}{more}; "
                "choose another --out, or delete the folder"
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save(config, path)


def is_finished(folder: Path) -> bool:
    return (folder / "result.json").is_file()


def read_result(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "result.json")
    except ValueError as error:
        raise UserError(f"{folder / 'result.json'} is damaged ({error}); delete it and start the run again") from error


def write_result(folder: Path, result: dict[str, Any], accelerator: Accelerator) -> None:
    """Mark the run as finished. Collective."""
    if accelerator.is_main_process:
        write_json(folder / "result.json", result | provenance(accelerator))
    accelerator.wait_for_everyone()


def provenance(accelerator: Accelerator) -> dict[str, Any]:
    """Where a result comes from: versions, commit, device."""
    packages = ("torch", "accelerate", "diffusers", "webdataset", "triton", "deepspeed", "numpy")
    versions = {"mgcc_dist": mgcc_dist.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cuda = accelerator.device.type == "cuda"
    return {
        "versions": versions,
        "commit": commit(),
        "world_size": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "device": torch.cuda.get_device_name(accelerator.device) if cuda else f"cpu ({platform.machine()})",
    }


def commit() -> str | None:
    """The source tree's commit, with `+` when files differ from it; None when this is not a git checkout."""
    root = Path(mgcc_dist.__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != root:
            return None
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
