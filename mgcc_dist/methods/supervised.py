"""Supervised training with 0.5 * BCE + Dice (Eq. 10) on the labeled images; unlabeled images are ignored."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mgcc_dist.methods.config import SupervisedConfig
from mgcc_dist.methods.losses import mean_supervised_loss
from mgcc_dist.methods.method import Method
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.train.schedules import Progress

if TYPE_CHECKING:
    from mgcc_dist.data.batch import Batch


class Supervised(Method):
    """Any network. With auxiliary decoders, the loss is the mean over all decoders (Eq. 9)."""

    uses_unlabeled = False

    def __init__(self, config: SupervisedConfig, network: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.network = build_network(network)

    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        output = self.network(batch.images[: batch.labeled])
        decoders = [output[0], *output[1]] if isinstance(output, tuple) else [output]
        loss = mean_supervised_loss(decoders, batch.masks, self.config.dice_smooth)
        return {"loss": loss, "supervised": loss}

    def predictor(self) -> nn.Module:
        return self.network.inference_module()
