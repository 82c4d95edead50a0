"""The form of saved configs and weights headers, and how those of version 0.1 are read.

Version 0.1 had no `schema_version`. Its sections `network` and `method` held the keys of all networks and methods, the
Swin-UNet of ctbct took its keys from `network`, and `loop` held the keys of the optimizer.
"""

import copy
from collections.abc import Mapping
from typing import Any

from mgcc_dist.common.errors import SharedError

SCHEMA_VERSION = 2
_SWIN = ("embed_dim", "depths", "heads", "window", "drop_path")
_NETWORKS = {
    "unet": ("widths",),
    "cmunet": ("widths", "mixer_layers", "kernel_size"),
    "mgcc": ("widths", "taps", "kernel_size", "gates", "perturb"),
    "cct": ("widths", "perturb"),
    "swin_unet": _SWIN,
}
_METHODS = {
    "supervised": (),
    "mean_teacher": ("ramp", "teacher_decay", "teacher_start"),
    "uamt": ("ramp", "teacher_decay"),
    "dct": ("ramp", "views", "adversarial_step"),
    "cps": ("ramp",),
    "ctbct": ("ramp",),
    "cct": ("ramp", "detach_target"),
    "mgcc": ("ramp", "detach_target"),
    "cutmix_teacher": ("ramp", "teacher_decay"),
}
_OPTIMIZER = ("momentum", "weight_decay")


def with_version(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Add the schema version to what is saved."""
    return {"schema_version": SCHEMA_VERSION, **tree}


def current(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return what was saved in the form of this version, without the schema version.

    Raises:
        UserError: a later version saved it; the message names `source`.
    """
    keys = copy.deepcopy(dict(tree))
    version = keys.pop("schema_version", None)
    if version is None:
        return _from_0_1(keys)
    if version != SCHEMA_VERSION:
        raise SharedError(
            f"{source}: schema_version is {version!r}, and this version reads {SCHEMA_VERSION}. Update mgcc-dist."
        )
    return keys


def _from_0_1(tree: dict[str, Any]) -> dict[str, Any]:
    network: Any = tree.get("network")
    method: Any = tree.get("method")
    if _is_flat(network, _NETWORKS):
        if isinstance(method, dict) and method.get("name") == "ctbct":
            method["swin_unet"] = {key: network[key] for key in ("in_channels", *_SWIN)}
        tree["network"] = _chosen(network, ("name", "in_channels", *_NETWORKS[network["name"]]))
    if _is_flat(method, _METHODS):
        tree["method"] = _chosen(method, ("name", "swin_unet", *_METHODS[method["name"]]))
    for section in (tree, tree.get("autoencoder"), tree.get("denoiser")):
        if isinstance(section, dict) and isinstance(section.get("loop"), dict):
            section["loop"] = _with_optimizer(section["loop"])
    return tree


def _is_flat(section: Any, keys: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a section holds the keys of all components, as version 0.1 saved it."""
    everything = {key for names in keys.values() for key in names}
    return isinstance(section, dict) and section.get("name") in keys and everything <= section.keys()


def _chosen(section: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key in keys}


def _with_optimizer(loop: Mapping[str, Any]) -> dict[str, Any]:
    """Move the optimizer's keys to a section of their own."""
    own = _chosen(loop, _OPTIMIZER)
    if not own or isinstance(loop.get("optimizer"), dict):
        return dict(loop)
    name = loop.get("optimizer")
    if name in ("adam", "adamw"):  # it had no use for the momentum
        own.pop("momentum", None)
    optimizer = ({"name": name} if name is not None else {}) | own
    moved = {key: optimizer if key == "optimizer" else value for key, value in loop.items() if key not in _OPTIMIZER}
    return moved if "optimizer" in moved else moved | {"optimizer": optimizer}
