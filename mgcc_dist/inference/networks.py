"""Build a network by name from Python: `mgcc.build_network("mgcc", widths=(16, 32, 64, 128, 256))`."""

from dataclasses import fields
from typing import Any

from mgcc_dist.common.errors import UserError
from mgcc_dist.models import registry
from mgcc_dist.models.config import NetworkConfig


def build_network(name: str, **config: Any) -> registry.Network:
    """Build a segmentation network with fresh weights.

    Args:
        name: "unet", "cmunet", "mgcc", "cct" or "swin_unet".
        config: keys of `NetworkConfig`; the defaults are the paper's.

    Returns:
        A module that maps images [B,in_channels or 1,H,W] in [-1,1] to logits [B,1,H,W]. In training mode "mgcc" and
        "cct" return (main logits, list of auxiliary logits).

    Raises:
        UserError: unknown name or key, or a value that the network cannot have.
    """
    if name not in registry.NETWORKS:
        raise UserError(f"build_network: unknown network {name!r}. Choose one of {', '.join(registry.NETWORKS)}.")
    keys = [field.name for field in fields(NetworkConfig) if field.name != "name"]
    if unknown := sorted(config.keys() - set(keys)):
        raise UserError(f"build_network: unknown key {unknown[0]!r}. A network has {', '.join(keys)}.")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    try:
        return registry.build_network(NetworkConfig(name=name, **values))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UserError(f"build_network: {error}") from error
