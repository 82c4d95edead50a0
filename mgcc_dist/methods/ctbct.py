"""Cross teaching between CNN and transformer, CTBCT (Luo et al. 2022), in the form of SSL4MIS' 2D script."""

from dataclasses import replace

from torch import Tensor

from mgcc_dist.methods.cps import CrossPseudoSupervision
from mgcc_dist.methods.losses import dice_loss
from mgcc_dist.models.config import NetworkConfig


class CrossTeaching(CrossPseudoSupervision):
    """Cross pseudo supervision between a U-Net and a Swin-UNet, by Dice. The U-Net predicts."""

    networks = ("unet",)

    def partner(self, network: NetworkConfig) -> NetworkConfig:
        """A Swin-UNet, with the Swin keys of the U-Net's section."""
        return replace(network, name="swin_unet")

    def pseudo_loss(self, logits: Tensor, pseudo_masks: Tensor) -> Tensor:
        return dice_loss(logits, pseudo_masks)
