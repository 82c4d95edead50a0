"""Segmentation networks by name. A new network is one file in this folder and one line in `NETWORKS`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Union

from mgcc_dist.models.cct import CCT
from mgcc_dist.models.cmunet import CMUNet
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.mgcc import MGCC
from mgcc_dist.models.unet import UNet

if TYPE_CHECKING:
    from mgcc_dist.models.swin_unet import SwinUNet

Network = Union[UNet, CMUNet, MGCC, CCT, "SwinUNet"]


def _swin_unet(config: NetworkConfig) -> "SwinUNet":
    from mgcc_dist.models.swin_unet import SwinUNet  # imported here because monai takes seconds to import

    return SwinUNet(config.in_channels, config.embed_dim, config.depths, config.heads, config.window, config.drop_path)


NETWORKS: dict[str, Callable[[NetworkConfig], Network]] = {
    "unet": lambda c: UNet(c.in_channels, c.widths),
    "cmunet": lambda c: CMUNet(c.in_channels, c.widths, c.mixer_layers, c.kernel_size),
    "mgcc": lambda c: MGCC(c.in_channels, c.widths, c.taps, c.kernel_size, c.gates, c.perturb),
    "cct": lambda c: CCT(c.in_channels, c.widths, c.perturb),
    "swin_unet": _swin_unet,
}


def build_network(config: NetworkConfig) -> Network:
    """Build the network `config.name` with freshly initialised weights."""
    return NETWORKS[config.name](config)
