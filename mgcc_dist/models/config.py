"""Configs of the segmentation networks: which there are, their sizes, and what methods can expect of each."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, Protocol

from mgcc_dist.common.components import Registry
from mgcc_dist.common.options import data_input, recorded
from mgcc_dist.common.value_types import FolderOrName

InputRange = Literal["unit", "released"]
ENCODER_LEVELS = 6
"""levels of a network with a pretrained encoder: strides 1, 2, 4, 8, 16, 32"""
SWIN_PATCH = 4
"""side of the patches that a Swin-UNet embeds, in pixels"""


class Capabilities(Protocol):
    """What methods and checks can expect of a network before it is built. They choose by this, not by name."""

    has_encoder_features: ClassVar[bool] = False
    """whether it is an `EncoderDecoder`, so that methods can change the features between the two"""
    has_batch_norm: ClassVar[bool] = True
    """whether it normalizes over the batch down to the deepest level, which needs more than one value there"""

    @property
    def auxiliary_outputs(self) -> int:
        """Number of auxiliary logits in training: 0 returns logits, more (logits, [auxiliary logits, ...])."""
        return 0

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per step of the feature maps of each level, shallow to deep."""
        return (1,)

    @property
    def size_divisor(self) -> int:
        """The sides of images must be multiples of this."""
        return self.strides[-1]


@dataclass(frozen=True)
class NetworkConfig(Capabilities):
    """Keys that all networks have."""

    name: str
    """architecture; `mgcc list networks` describes them"""
    in_channels: int = 3
    """input channels; grey images are repeated to fill them (paper: 3)"""

    def __post_init__(self) -> None:
        if self.in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {self.in_channels}")


@dataclass(frozen=True)
class EncoderDecoderConfig(NetworkConfig):
    """Keys of networks whose levels each halve the image."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """channels per level, shallow to deep (paper: 64, 128, 256, 512, 1024); with an encoder, six values"""
    input_range: InputRange = "unit"
    """values that the first convolution sees. unit: [-1,1]; released: [-0.008,0.01], as in MGCC's released code, which
    divides normalized images by 255 again"""
    encoder: FolderOrName | None = data_input(None)
    """pretrained backbone as the encoder: its folder, or its name on the Hugging Face hub, then it is
    downloaded. A hierarchical one of transformers, such as a ResNet, ConvNeXt or Swin, or of timm. Grey images are
    repeated to its channels, which keeps its weights and normalization; image_size must be a multiple of 32
    (pip install 'mgcc-dist[encoders]')"""
    encoder_config: str | None = recorded(None)
    """architecture of the encoder, which weights files hold so that they load without it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(f"widths must be at least two positive numbers, got {self.widths}")
        if self.encoder is None and self.encoder_config is None:
            return
        if len(self.widths) != ENCODER_LEVELS:
            raise ValueError(
                f"widths must be {ENCODER_LEVELS} numbers with an encoder, one for each of the strides 1, 2, 4, 8, 16, "
                f"32, such as [32, 64, 128, 256, 512, 1024], got {self.widths}"
            )
        if self.input_range != "unit":
            raise ValueError(f"input_range must be unit with an encoder, which normalizes, got {self.input_range}")

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(2**level for level in range(len(self.widths)))


@dataclass(frozen=True)
class UNetConfig(EncoderDecoderConfig):
    """U-Net (Ronneberger et al. 2015)."""

    name: Literal["unet"] = "unet"
    has_encoder_features = True


@dataclass(frozen=True)
class CMUNetConfig(EncoderDecoderConfig):
    """CMU-Net (Tang et al. 2023): U-Net with ConvMixer layers on the bottleneck and attention gates."""

    name: Literal["cmunet"] = "cmunet"
    mixer_layers: int = 7
    """ConvMixer layers on the bottleneck (paper: 7)"""
    kernel_size: int = 7
    """kernel size of the ConvMixer, odd (paper: 7)"""
    has_encoder_features = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixer_layers < 1:
            raise ValueError(f"mixer_layers must be at least 1, got {self.mixer_layers}")
        _check_kernel_size(self.kernel_size)


@dataclass(frozen=True)
class MGCCConfig(EncoderDecoderConfig):
    """The paper's network: shared ConvMixer levels, gated skips, K auxiliary decoders."""

    name: Literal["mgcc"] = "mgcc"
    taps: tuple[int, ...] = (3, 6, 9)
    """ConvMixer layers before auxiliary decoders 2, 3, ... and, last, before the main decoder. Its length K is the
    number of auxiliary decoders; the first takes the encoder's output (paper: 3, 6, 9; Table VI varies it)"""
    kernel_size: int = 7
    """kernel size of the ConvMixer, odd (paper: 7)"""
    gates: tuple[bool, ...] = (True, True, True, True)
    """attention gates on the skip connections of auxiliary decoders 1 to K and, last, of the main decoder (paper: all
    true; Table V varies it)"""
    perturb: Literal["all_levels", "bottleneck"] = "all_levels"
    """features perturbed for an auxiliary decoder: all levels including the skips (released code), or the bottleneck,
    as in Eq. 7"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.taps or any(after <= before for before, after in pairwise((0, *self.taps))):
            raise ValueError(f"taps must be positive and increase, got {self.taps}")
        _check_kernel_size(self.kernel_size)
        if len(self.gates) != len(self.taps) + 1:
            raise ValueError(
                f"gates needs {len(self.taps) + 1} values, one for each auxiliary decoder (as many as taps) and one "
                f"for the main decoder, got {self.gates}"
            )

    @property
    def auxiliary_outputs(self) -> int:
        return len(self.taps)


@dataclass(frozen=True)
class CCTConfig(EncoderDecoderConfig):
    """U-Net with three auxiliary decoders (Ouali et al. 2020)."""

    name: Literal["cct"] = "cct"
    perturb: Literal["all_levels", "bottleneck"] = "all_levels"
    """features perturbed for an auxiliary decoder: all levels including the skips (SSL4MIS), or the bottleneck"""

    @property
    def auxiliary_outputs(self) -> int:
        return 3


@dataclass(frozen=True)
class SwinUNetConfig(NetworkConfig):
    """Swin-UNet (Cao et al. 2022)."""

    name: Literal["swin_unet"] = "swin_unet"
    embed_dim: int = 96
    """channels of the first stage, doubled in every next one (original: 96)"""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Swin blocks per stage, shallow to deep, in encoder and decoder (original: 2, 2, 2, 2)"""
    heads: tuple[int, ...] = (3, 6, 12, 24)
    """attention heads per stage; must divide its channels (original: 3, 6, 12, 24)"""
    window: int = 8
    """side of the attention windows, in tokens; image_size must be a multiple of 4 * 2^(stages - 1) * window, hence 8
    for 256 (original: 7, for 224)"""
    drop_path: float = 0.2
    """stochastic depth rate of the last block, linear from 0 at the first block (SSL4MIS: 0.2)"""
    has_batch_norm = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, got {self.embed_dim}")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths must be one or more positive numbers, got {self.depths}")
        widths = [self.embed_dim * 2**stage for stage in range(len(self.depths))]
        if len(self.heads) != len(widths) or any(
            h < 1 or width % h for width, h in zip(widths, self.heads, strict=True)
        ):
            raise ValueError(f"heads must divide the stages' channels {widths}, one for each, got {self.heads}")
        if self.window < 2:
            raise ValueError(f"window must be at least 2, got {self.window}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {self.drop_path}")

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(SWIN_PATCH * 2**stage for stage in range(len(self.depths)))

    @property
    def size_divisor(self) -> int:
        return self.strides[-1] * self.window


def _check_kernel_size(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")


NETWORKS = Registry("network", NetworkConfig, default="mgcc")
NETWORKS.register(UNetConfig, "mgcc_dist.models.unet:UNet")
NETWORKS.register(CMUNetConfig, "mgcc_dist.models.cmunet:CMUNet")
NETWORKS.register(MGCCConfig, "mgcc_dist.models.mgcc:MGCC")
NETWORKS.register(CCTConfig, "mgcc_dist.models.cct:CCT")
NETWORKS.register(SwinUNetConfig, "mgcc_dist.models.swin_unet:SwinUNet")
