"""What network is built, and how wide."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class NetworkConfig:
    name: Literal["unet", "cmunet", "mgcc", "cct", "swin_unet"] = "mgcc"
    """unet; cmunet, a U-Net with ConvMixer and gates; mgcc; cct, a U-Net with three auxiliary decoders; swin_unet; each
    key below says which of them use it"""
    in_channels: int = 3
    """channels of the first convolution; grey images are repeated to fill them (all networks; paper: 3)"""
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """channels of each level, shallow to deep (unet, cmunet, mgcc, cct; paper: 64, 128, 256, 512, 1024)"""
    taps: tuple[int, ...] = (3, 6, 9)
    """ConvMixer layers before auxiliary decoders 2, 3, ... and, last, the main decoder; their number is also the number
    K of auxiliary decoders, of which the first sees the encoder's output (mgcc; paper: 3, 6, 9; others in Table VI)"""
    kernel_size: int = 7
    """of the ConvMixer's depthwise convolutions, in pixels, odd (cmunet, mgcc; paper: 7)"""
    gates: tuple[bool, ...] = (True, True, True, True)
    """whether the skips of auxiliary decoders 1 to K and, last, of the main decoder pass attention gates (mgcc; paper:
    all; others in Table V)"""
    perturb: Literal["all_levels", "bottleneck"] = "all_levels"
    """what is perturbed for an auxiliary decoder: all levels, skips too (released code), or the bottleneck, as in Eq. 7
    (mgcc, cct)"""
    mixer_layers: int = 7
    """ConvMixer layers on the bottleneck (cmunet; paper: 7; mgcc's are the last of taps)"""

    embed_dim: int = 96
    """channels of the first stage, doubled in each further one (swin_unet, also that of method ctbct; original: 96)"""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Swin blocks of each stage, shallow to deep; the decoder's stages are as deep (swin_unet; original: 2, 2, 2, 2)"""
    heads: tuple[int, ...] = (3, 6, 12, 24)
    """attention heads of each stage; they divide its channels (swin_unet; original: 3, 6, 12, 24)"""
    window: int = 8
    """side of the attention's windows, in positions; image_size divides by 4 * 2^(stages - 1) * window, so 8 for 256
    (swin_unet; original: 7, for 224)"""
    drop_path: float = 0.2
    """probability that the last block's branches are skipped in training; linear from 0 at the first block (swin_unet;
    SSL4MIS: 0.2)"""

    def __post_init__(self) -> None:
        if self.in_channels < 1:
            raise ValueError(f"network.in_channels must be at least 1, got {self.in_channels}")
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(f"network.widths must be at least two positive numbers, got {self.widths}")
        if not self.taps or any(after <= before for before, after in pairwise((0, *self.taps))):
            raise ValueError(f"network.taps must be positive and increase, got {self.taps}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"network.kernel_size must be odd and positive, got {self.kernel_size}")
        if self.mixer_layers < 1:
            raise ValueError(f"network.mixer_layers must be at least 1, got {self.mixer_layers}")
        if len(self.gates) != len(self.taps) + 1:
            raise ValueError(
                f"network.gates needs {len(self.taps) + 1} values, one for each auxiliary decoder (as many as "
                f"network.taps) and one for the main decoder, got {self.gates}"
            )
        if self.embed_dim < 1:
            raise ValueError(f"network.embed_dim must be at least 1, got {self.embed_dim}")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"network.depths must be one or more positive numbers, got {self.depths}")
        widths = [self.embed_dim * 2**stage for stage in range(len(self.depths))]
        if len(self.heads) != len(widths) or any(
            h < 1 or width % h for width, h in zip(widths, self.heads, strict=True)
        ):
            raise ValueError(f"network.heads must divide the stages' channels {widths}, one for each, got {self.heads}")
        if self.window < 2:
            raise ValueError(f"network.window must be at least 2, got {self.window}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"network.drop_path must be at least 0 and below 1, got {self.drop_path}")
