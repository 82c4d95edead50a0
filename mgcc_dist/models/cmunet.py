"""CMU-Net (Tang et al. 2023): 49.93 M parameters, as published, and 91.10 GMACs at 256x256 with the default sizes.

The authors' benchmarks report 91.25 GMACs, because they count two operations per batch-norm value.
"""

from collections.abc import Sequence

from torch import Tensor

from mgcc_dist.models.blocks import ConvMixer
from mgcc_dist.models.config import InputRange
from mgcc_dist.models.network import EncoderDecoder
from mgcc_dist.models.unet import PAPER_WIDTHS, Decoder, build_encoder


class CMUNet(EncoderDecoder):
    """U-Net with ConvMixer layers on the bottleneck and a gate on each skip.

    Images [B,in_channels or 1,H,W] -> logits [B,1,H,W].
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = PAPER_WIDTHS,
        mixer_layers: int = 7,
        kernel_size: int = 7,
        input_range: InputRange = "unit",
        encoder: str | None = None,
        encoder_config: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder = build_encoder(in_channels, widths, input_range, encoder, encoder_config)
        self.mixer = ConvMixer(widths[-1], kernel_size, mixer_layers)
        self.decoder = Decoder(widths, gated=True)

    def encode(self, x: Tensor) -> list[Tensor]:
        return self.encoder(x)

    def decode(self, features: list[Tensor]) -> Tensor:
        *skips, bottleneck = features
        return self.decoder([*skips, self.mixer(bottleneck)])
