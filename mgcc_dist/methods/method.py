"""The interface of a training method: its networks and the losses of one batch."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from mgcc_dist.common.errors import UserError
from mgcc_dist.methods.config import METHODS, MethodConfig
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.train.schedules import Progress

if TYPE_CHECKING:
    from mgcc_dist.data.batch import Batch


class Method(nn.Module, ABC):
    """A module that holds all networks of a method, so that DDP or DeepSpeed wraps them as one.

    It is built from two configs: its own, and that of the section `network`.
    """

    uses_unlabeled: ClassVar[bool] = True
    """whether it has a loss on unlabeled images and needs some in each batch"""

    def forward(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        dtype = next(self.parameters()).dtype
        if batch.images.dtype != dtype:  # DeepSpeed makes the weights bf16 and casts tensors, but no batches
            weak = None if batch.weak is None else batch.weak.to(dtype)
            batch = replace(batch, images=batch.images.to(dtype), weak=weak)
        return self.step(batch, progress)

    @abstractmethod
    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        """Compute the scalar float32 losses of a batch in training mode; "loss" is minimised."""

    @abstractmethod
    def predictor(self) -> nn.Module:
        """Return the inference network, images [B,1,H,W] -> logits [B,1,H,W]; it shares weights with this module."""

    def initialize(self, state: dict[str, Tensor]) -> None:
        """Load trained weights into the inference network; methods with a teacher give it the same weights."""
        self.predictor().load_state_dict(state)

    def check_length(self, images: int) -> None:
        """Check that the method can train for a run that sees `images` labeled images.

        Raises:
            UserError: it can't.
        """

    def after_step(self, progress: Progress) -> None:
        """Update what the optimizer does not, such as a teacher; called after every optimizer step."""


def build(config: MethodConfig, network: NetworkConfig) -> Method:
    """Build the method that `config` names with freshly initialised networks.

    Raises:
        UserError: it cannot train that network.
    """
    try:
        config.check_network(network)
    except ValueError as error:
        raise UserError(str(error)) from error
    return METHODS.load(config)(config, network)


def weighted_losses(supervised: Tensor, consistency: Tensor, weight: float) -> dict[str, Tensor]:
    """Return "loss" = supervised + weight * consistency, and its parts, for `Method.step`."""
    return {
        "loss": supervised + weight * consistency,
        "supervised": supervised,
        "consistency": consistency,
        "weight": supervised.new_full((), weight),
    }
