"""What a training method is: networks, and the losses of one batch."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from mgcc_dist.common.errors import UserError
from mgcc_dist.methods.config import MethodConfig
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.train.schedules import Progress

if TYPE_CHECKING:
    from mgcc_dist.data.loader import Batch


ONE_DECODER = ("unet", "cmunet", "swin_unet")  # values of network.name without auxiliary decoders


class Method(nn.Module, ABC):
    """One module that holds all networks of a method, so that DDP or DeepSpeed can wrap it whole."""

    uses_unlabeled: ClassVar[bool] = True
    """whether it has a loss on unlabeled images, and so needs some in each batch"""
    networks: ClassVar[tuple[str, ...] | None] = None
    """values of network.name that it can train; None for all"""

    def __init__(self, config: MethodConfig, network: NetworkConfig) -> None:
        """Subclasses add their networks.

        Raises:
            UserError: the method can't train `network`.
        """
        super().__init__()
        if self.networks is not None and network.name not in self.networks:
            raise UserError(
                f"method.name {config.name} needs network.name {' or '.join(self.networks)}, got {network.name}"
            )
        self.config = config

    def forward(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        return self.step(batch, progress)

    @abstractmethod
    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        """Scalar float32 losses of a batch, in training mode; the one named "loss" is minimised."""

    @abstractmethod
    def predictor(self) -> nn.Module:
        """The network that predicts, images [B,1,H,W] -> logits [B,1,H,W]; shares its weights with this module."""

    def after_step(self, progress: Progress) -> None:
        """Called after every optimizer step."""


def total(supervised: Tensor, consistency: Tensor, weight: float) -> dict[str, Tensor]:
    """The losses that a semi-supervised step reports: supervised + weight * consistency, and its parts."""
    return {
        "loss": supervised + weight * consistency,
        "supervised": supervised,
        "consistency": consistency,
        "weight": supervised.new_full((), weight),
    }
