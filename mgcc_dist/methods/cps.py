"""Cross pseudo supervision, CPS (Chen et al. 2021), as implemented by SSL4MIS' 2D script."""

from abc import abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.methods.config import CrossPseudoSupervisionConfig, SemiSupervisedConfig
from mgcc_dist.methods.losses import supervised_loss
from mgcc_dist.methods.method import Method, weighted_losses
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.train.schedules import Progress, consistency_weight

if TYPE_CHECKING:
    from mgcc_dist.data.batch import Batch


class TwoNetworks(Method):
    """Two networks. On unlabeled images each learns the other's pseudo-masks. The first predicts.

    One optimizer updates both, which for SGD equals one optimizer each.
    """

    def __init__(self, config: SemiSupervisedConfig, first: NetworkConfig, second: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.first = build_network(first)
        self.second = build_network(second)

    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        n = batch.labeled
        first, second = self.first(batch.images), self.second(batch.images)
        supervised = supervised_loss(first[:n], batch.masks, self.config.dice_smooth) + supervised_loss(
            second[:n], batch.masks, self.config.dice_smooth
        )
        first_loss = self.pseudo_loss(first[n:].float(), (second[n:].detach() > 0).float())
        second_loss = self.pseudo_loss(second[n:].float(), (first[n:].detach() > 0).float())
        return weighted_losses(supervised, first_loss + second_loss, consistency_weight(self.config.ramp, progress))

    def predictor(self) -> nn.Module:
        return self.first.inference_module()

    @abstractmethod
    def pseudo_loss(self, logits: Tensor, pseudo_masks: Tensor) -> Tensor:
        """Loss of logits [U,1,H,W] against the other network's pseudo-masks [U,1,H,W] in {0,1}."""


class CrossPseudoSupervision(TwoNetworks):
    """Two networks of the same architecture with different initialisations, and BCE."""

    def __init__(self, config: CrossPseudoSupervisionConfig, network: NetworkConfig) -> None:
        super().__init__(config, network, network)

    def pseudo_loss(self, logits: Tensor, pseudo_masks: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, pseudo_masks)
