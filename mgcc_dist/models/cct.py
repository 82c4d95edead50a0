"""The network of cross-consistency training, CCT (Ouali et al. 2020), as SSL4MIS builds it on a U-Net.

34.53 M parameters at inference (those of the U-Net), 81.55 M in training, at the default widths.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from mgcc_dist.models.blocks import dropout, feature_dropout, feature_noise, perturbed
from mgcc_dist.models.config import InputRange
from mgcc_dist.models.network import Network
from mgcc_dist.models.unet import PAPER_WIDTHS, Decoder, build_encoder

PERTURBATIONS = (feature_noise, dropout, feature_dropout)


class CCTInference(nn.Module):
    """The inference part of CCT, a U-Net: images [B,in_channels or 1,H,W] -> logits [B,1,H,W]."""

    def __init__(self, encoder: nn.Module, main: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        return self.main(self.encoder(x))


class CCT(Network):
    """Shared encoder, a main decoder, three auxiliary decoders with F-Noise, Dropout and F-Drop; plain skips.

    In training mode: images [B,in_channels or 1,H,W] -> (main logits [B,1,H,W], three auxiliary logits [B,1,H,W]). In
    evaluation mode: only the main logits; no auxiliary decoder runs. `perturb` selects the perturbed features: all
    levels including the skips (SSL4MIS), or the bottleneck (Ouali et al., whose decoders have no skips).
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = PAPER_WIDTHS,
        perturb: Literal["all_levels", "bottleneck"] = "all_levels",
        input_range: InputRange = "unit",
        encoder: str | None = None,
        encoder_config: str | None = None,
    ) -> None:
        super().__init__()
        self.perturb_skips = perturb == "all_levels"
        self.encoder = build_encoder(in_channels, widths, input_range, encoder, encoder_config)
        self.main = Decoder(widths, gated=False)
        self.auxiliary = nn.ModuleList(Decoder(widths, gated=False) for _ in PERTURBATIONS)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        features = self.encoder(x)
        if not self.training:
            return self.main(features)
        auxiliary = [
            decoder(perturbed(features, perturb, self.perturb_skips))
            for decoder, perturb in zip(self.auxiliary, PERTURBATIONS, strict=True)
        ]
        return self.main(features), auxiliary

    def inference_module(self) -> CCTInference:
        """Return the network without auxiliary decoders; it shares its modules with this one."""
        return CCTInference(self.encoder, self.main)

    def decoders(self) -> list[nn.Module]:
        return [self.inference_module(), *(CCTInference(self.encoder, decoder) for decoder in self.auxiliary)]
