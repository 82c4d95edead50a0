"""The MGCC network (Section III-C, Fig. 2): 52.14 M parameters at inference, 122.18 M in training.

    encoder --f_0--> mixer layers 1..3 --f_3--> layers 4..6 --f_6--> layers 7..9 --f_9--> main decoder
               |                          |                    |
             F-Drop                    Dropout              F-Noise
               v                          v                    v
         auxiliary decoder 1     auxiliary decoder 2   auxiliary decoder 3

In general auxiliary decoder 1 sees the encoder's output, decoder k the mixer's after taps[k-2] layers, the main decoder
after taps[-1]; so there are K = len(taps) auxiliary decoders, and their perturbations repeat after three.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from mgcc_dist.models.blocks import ConvMixer, dropout, feature_dropout, feature_noise, perturbed
from mgcc_dist.models.unet import PAPER_WIDTHS, Decoder, Encoder

PERTURBATIONS = (feature_dropout, dropout, feature_noise)


class MGCCInference(nn.Module):
    """The part of MGCC that predicts: images [B,in_channels or 1,H,W] -> logits [B,1,H,W] of the main decoder."""

    def __init__(self, encoder: Encoder, mixer: ConvMixer, main: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.mixer = mixer
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        *skips, bottleneck = self.encoder(x)
        return self.main([*skips, self.mixer(bottleneck)])


class MGCC(nn.Module):
    """Shared encoder and ConvMixer, a main decoder, K auxiliary decoders.

    In training, images [B,in_channels or 1,H,W] -> (main logits [B,1,H,W], K auxiliary logits [B,1,H,W]). In evaluation
    the main logits alone, and no auxiliary decoder runs.

    `gates` says for each decoder, auxiliary 1 to K and then main, whether its skips are gated (Table V). `perturb` says
    what the auxiliary decoders get perturbed: all levels, skips too (the released code), or the bottleneck (Eq. 7).
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = PAPER_WIDTHS,
        taps: Sequence[int] = (3, 6, 9),
        kernel_size: int = 7,
        gates: Sequence[bool] = (True, True, True, True),
        perturb: Literal["all_levels", "bottleneck"] = "all_levels",
    ) -> None:
        super().__init__()
        self.depths = (0, *taps[:-1])
        self.perturb_skips = perturb == "all_levels"
        self.encoder = Encoder(in_channels, widths)
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
        """What is needed to predict, without the auxiliary decoders; shares its parts with this network."""
        return MGCCInference(self.encoder, self.mixer, self.main)
