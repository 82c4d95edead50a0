"""The MGCC network (Section III-C, Fig. 2): 52.14 M parameters at inference, 122.18 M in training.

    encoder --f_0--> mixer layers 1..3 --f_3--> layers 4..6 --f_6--> layers 7..9 --f_9--> main decoder
               |                          |                    |
             F-Drop                    Dropout              F-Noise
               v                          v                    v
         auxiliary decoder 1     auxiliary decoder 2   auxiliary decoder 3

In general auxiliary decoder 1 takes the encoder's output, decoder k the mixer's output after taps[k-2] layers, and the
main decoder the one after taps[-1]. So there are K = len(taps) auxiliary decoders; the three perturbations repeat.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from mgcc_dist.models.blocks import ConvMixer, dropout, feature_dropout, feature_noise, perturbed
from mgcc_dist.models.config import InputRange
from mgcc_dist.models.network import Network
from mgcc_dist.models.unet import PAPER_WIDTHS, Decoder, build_encoder

PERTURBATIONS = (feature_dropout, dropout, feature_noise)


class MGCCInference(nn.Module):
    """The inference part of MGCC: images [B,in_channels or 1,H,W] -> logits [B,1,H,W] of the main decoder."""

    def __init__(self, encoder: nn.Module, mixer: nn.Module, main: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.mixer = mixer
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        *skips, bottleneck = self.encoder(x)
        return self.main([*skips, self.mixer(bottleneck)])


class MGCC(Network):
    """Shared encoder and ConvMixer, a main decoder, K auxiliary decoders.

    In training mode: images [B,in_channels or 1,H,W] -> (main logits [B,1,H,W], K auxiliary logits [B,1,H,W]). In
    evaluation mode: only the main logits; no auxiliary decoder runs.

    `gates` switches the attention gates of each decoder, auxiliary 1 to K and then main (Table V). `perturb` selects
    the perturbed features: all levels including the skips (the released code), or the bottleneck (Eq. 7).
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = PAPER_WIDTHS,
        taps: Sequence[int] = (3, 6, 9),
        kernel_size: int = 7,
        gates: Sequence[bool] = (True, True, True, True),
        perturb: Literal["all_levels", "bottleneck"] = "all_levels",
        input_range: InputRange = "unit",
        encoder: str | None = None,
        encoder_config: str | None = None,
    ) -> None:
        super().__init__()
        self.depths = (0, *taps[:-1])
        self.perturb_skips = perturb == "all_levels"
        self.encoder = build_encoder(in_channels, widths, input_range, encoder, encoder_config)
        self.mixer = ConvMixer(widths[-1], kernel_size, taps[-1])
        self.main = Decoder(widths, gates[-1])
        self.auxiliary = nn.ModuleList(Decoder(widths, gated) for gated in gates[:-1])

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        *skips, bottleneck = self.encoder(x)
        if not self.training:
            return self.main([*skips, self.mixer(bottleneck)])
        bottlenecks = [bottleneck, *self.mixer.outputs(bottleneck)]  # after 0, 1, ... taps[-1] layers
        auxiliary = [
            decoder(perturbed([*skips, bottlenecks[depth]], PERTURBATIONS[k % 3], self.perturb_skips))  # Eq. 7
            for k, (decoder, depth) in enumerate(zip(self.auxiliary, self.depths, strict=True))
        ]
        return self.main([*skips, bottlenecks[-1]]), auxiliary  # Eq. 8

    def inference_module(self) -> MGCCInference:
        """Return the network without auxiliary decoders; it shares its modules with this one."""
        return MGCCInference(self.encoder, self.mixer, self.main)

    def decoders(self) -> list[nn.Module]:
        layers = list(self.mixer)
        auxiliary = zip(self.auxiliary, self.depths, strict=True)
        return [
            self.inference_module(),
            *(MGCCInference(self.encoder, nn.Sequential(*layers[:depth]), decoder) for decoder, depth in auxiliary),
        ]
