"""Segmentation networks, and the config that names one."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from mgcc_dist.models.mgcc import MGCC
from mgcc_dist.models.unet import UNet

__all__ = ["MGCC", "NetworkConfig", "UNet", "build_network"]


@dataclass(frozen=True)
class NetworkConfig:
    name: Literal["unet", "mgcc"] = "mgcc"
    """unet uses only in_channels and widths of the keys below"""
    in_channels: int = 3
    """channels of the first convolution; grey images are repeated to fill them (paper: 3)"""
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """channels of each level, shallow to deep (paper: 64, 128, 256, 512, 1024)"""
    taps: tuple[int, ...] = (3, 6, 9)
    """ConvMixer layers before auxiliary decoders 2, 3, ... and, last, the main decoder; their number is also the number
    K of auxiliary decoders, of which the first sees the encoder's output (paper: 3, 6, 9; others in Table VI)"""
    kernel_size: int = 7
    """of the ConvMixer's depthwise convolutions, in pixels, odd (paper: 7)"""
    gates: tuple[bool, ...] = (True, True, True, True)
    """whether the skips of auxiliary decoders 1 to K and, last, of the main decoder pass attention gates (paper: all;
    others in Table V)"""
    perturb: Literal["all_levels", "bottleneck"] = "all_levels"
    """what is perturbed for an auxiliary decoder: all levels, skips too (released code), or the bottleneck (Eq. 7)"""

    def __post_init__(self) -> None:
        if self.in_channels < 1:
            raise ValueError(f"network.in_channels must be at least 1, got {self.in_channels}")
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(f"network.widths must be at least two positive numbers, got {self.widths}")
        if not self.taps or any(after <= before for before, after in pairwise((0, *self.taps))):
            raise ValueError(f"network.taps must be positive and increase, got {self.taps}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"network.kernel_size must be odd and positive, got {self.kernel_size}")
        if len(self.gates) != len(self.taps) + 1:
            raise ValueError(
                f"network.gates needs {len(self.taps) + 1} values, one for each auxiliary decoder (as many as "
                f"network.taps) and one for the main decoder, got {self.gates}"
            )


def build_network(config: NetworkConfig) -> UNet | MGCC:
    """The network that `config` names, with fresh weights."""
    if config.name == "unet":
        return UNet(config.in_channels, config.widths)
    return MGCC(config.in_channels, config.widths, config.taps, config.kernel_size, config.gates, config.perturb)
