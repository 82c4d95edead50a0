"""What network is built, and how wide."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

SWIN_PATCH = 4
"""side in pixels of the patches that swin_unet embeds"""


@dataclass(frozen=True)
class NetworkConfig:
    name: Literal["unet", "cmunet", "mgcc", "cct", "swin_unet"] = "mgcc"
    """architecture: unet; cmunet (U-Net with ConvMixer and gates); mgcc; cct (U-Net with three auxiliary decoders);
    swin_unet. Each key below names the architectures that use it"""
    in_channels: int = 3
    """input channels; grey images are repeated to fill them (all; paper: 3)"""
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """channels per level, shallow to deep (unet, cmunet, mgcc, cct; paper: 64, 128, 256, 512, 1024)"""
    taps: tuple[int, ...] = (3, 6, 9)
    """ConvMixer layers before auxiliary decoders 2, 3, ... and, last, before the main decoder. Its length K is the
    number of auxiliary decoders; the first takes the encoder's output (mgcc; paper: 3, 6, 9; Table VI varies it)"""
    kernel_size: int = 7
    """kernel size of the ConvMixer's depthwise convolutions, in pixels, odd (cmunet, mgcc; paper: 7)"""
    gates: tuple[bool, ...] = (True, True, True, True)
    """attention gates on the skip connections of auxiliary decoders 1 to K and, last, of the main decoder (mgcc; paper:
    all true; Table V varies it)"""
    perturb: Literal["all_levels", "bottleneck"] = "all_levels"
    """features perturbed for an auxiliary decoder: all levels including the skips (released code), or the bottleneck,
    as in Eq. 7 (mgcc, cct)"""
    mixer_layers: int = 7
    """ConvMixer layers on the bottleneck (cmunet; paper: 7; mgcc has taps[-1])"""

    embed_dim: int = 96
    """channels of the first stage, doubled in every next one (swin_unet, also in method ctbct; original: 96)"""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Swin blocks per stage, shallow to deep, in encoder and decoder (swin_unet; original: 2, 2, 2, 2)"""
    heads: tuple[int, ...] = (3, 6, 12, 24)
    """attention heads per stage; must divide its channels (swin_unet; original: 3, 6, 12, 24)"""
    window: int = 8
    """side of the attention windows, in tokens; image_size must be a multiple of 4 * 2^(stages - 1) * window, hence 8
    for 256 (swin_unet; original: 7, for 224)"""
    drop_path: float = 0.2
    """stochastic depth rate of the last block, linear from 0 at the first block (swin_unet; SSL4MIS: 0.2)"""

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

    @property
    def size_divisor(self) -> int:
        """The image size must be a multiple of this, because each level halves it."""
        if self.name == "swin_unet":
            return SWIN_PATCH * 2 ** (len(self.depths) - 1) * self.window  # windows tile the features of every stage
        return 2 ** (len(self.widths) - 1)
