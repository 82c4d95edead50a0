"""Build a network by name from Python: `mgcc.build_network("mgcc", widths=(16, 32, 64, 128, 256))`."""

from dataclasses import dataclass
from typing import Any

from mgcc_dist.common.config import Layer, resolve
from mgcc_dist.models import network
from mgcc_dist.models.config import NetworkConfig


@dataclass(frozen=True)
class NetworkSection:
    """A config that has only a network."""

    network: NetworkConfig


def build_network(name: str, **config: Any) -> network.Network:
    """Build a segmentation network with fresh weights.

    Args:
        name: "unet", "cmunet", "mgcc", "cct", "swin_unet", or a plugin's.
        config: keys of the network, as `mgcc segment --network NAME --help-all` lists them; the defaults are the
            paper's.

    Returns:
        A module that maps images [B,in_channels or 1,H,W] in [-1,1] to logits [B,1,H,W]. In training mode "mgcc" and
        "cct" return (main logits, list of auxiliary logits).

    Raises:
        UserError: unknown name or key, or a value that the network cannot have.
    """
    section = resolve(NetworkSection, [Layer({"network": {"name": name, **config}}, "build_network")])
    return network.build_network(section.network)
