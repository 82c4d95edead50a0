"""Cross teaching between CNN and transformer, CTBCT (Luo et al. 2022), as implemented by SSL4MIS' 2D script."""

from dataclasses import replace

from torch import Tensor

from mgcc_dist.methods.cps import CrossPseudoSupervision
from mgcc_dist.methods.losses import dice_loss
from mgcc_dist.models.config import NetworkConfig


class CrossTeaching(CrossPseudoSupervision):
    """Cross pseudo supervision between a U-Net and a Swin-UNet, with the Dice loss. The U-Net predicts."""

    networks = ("unet",)

    def partner(self, network: NetworkConfig) -> NetworkConfig:
        """Config of the second network: a Swin-UNet, from the Swin keys of the same section."""
        return replace(network, name="swin_unet")

    def pseudo_loss(self, logits: Tensor, pseudo_masks: Tensor) -> Tensor:
        return dice_loss(logits, pseudo_masks)
