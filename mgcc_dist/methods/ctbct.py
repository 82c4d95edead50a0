"""Cross teaching between CNN and transformer, CTBCT (Luo et al. 2022), as implemented by SSL4MIS' 2D script."""

import torch
from torch import Tensor

from mgcc_dist.methods.config import CrossTeachingConfig
from mgcc_dist.methods.cps import TwoNetworks
from mgcc_dist.methods.losses import two_class_dice_loss
from mgcc_dist.models.config import NetworkConfig


class CrossTeaching(TwoNetworks):
    """Cross pseudo supervision between a CNN and a Swin-UNet, with two-class Dice. The CNN predicts."""

    def __init__(self, config: CrossTeachingConfig, network: NetworkConfig) -> None:
        super().__init__(config, network, config.swin_unet)

    def pseudo_loss(self, logits: Tensor, pseudo_masks: Tensor) -> Tensor:
        return two_class_dice_loss(logits, pseudo_masks, region=torch.ones_like(pseudo_masks))
