"""Multi-level global context cross-consistency, the paper's method (Section III-C, Eq. 9 to 12)."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mgcc_dist.methods.config import CrossConsistencyTrainingConfig, MultiLevelCrossConsistencyConfig
from mgcc_dist.methods.losses import consistency_loss, mean_supervised_loss
from mgcc_dist.methods.method import Method, weighted_losses
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.train.schedules import Progress, consistency_weight

if TYPE_CHECKING:
    from mgcc_dist.data.batch import Batch


class MultiLevelCrossConsistency(Method):
    """All decoders learn from labels; on unlabeled images the auxiliary decoders match the main decoder."""

    def __init__(
        self, config: MultiLevelCrossConsistencyConfig | CrossConsistencyTrainingConfig, network: NetworkConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.network = build_network(network)

    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        main, auxiliary = self.network(batch.images)  # one forward: BN normalises labeled and unlabeled together
        n = batch.labeled
        decoders = [y[:n] for y in (main, *auxiliary)]
        supervised = mean_supervised_loss(decoders, batch.masks, self.config.dice_smooth)  # Eq. 9, 10
        consistency = consistency_loss(main[n:], [y[n:] for y in auxiliary], self.config.detach_target)  # Eq. 11
        return weighted_losses(supervised, consistency, consistency_weight(self.config.ramp, progress))  # Eq. 12

    def predictor(self) -> nn.Module:
        return self.network.inference_module()
