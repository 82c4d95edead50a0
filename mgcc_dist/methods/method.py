"""What a training method is: networks, and the losses of one batch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mgcc_dist.schedules import Progress, Ramp

if TYPE_CHECKING:
    from mgcc_dist.data.loader import Batch


@dataclass(frozen=True)
class MethodConfig:
    name: str = "mgcc"
    """mgcc (labeled and unlabeled images) or supervised (labeled images alone, any network)"""
    ramp: Ramp = "released"
    """weight of the consistency loss over the run: released is 7 exp(-5 (1 - t/200)^2) with t = step // 150, as in the
    released code; compressed is that of its 20,000-step run fitted to this run's length; paper_0.1 is
    0.1 exp(-5 (1 - step/steps)^2) (the paper gives no highest weight)"""
    detach_target: bool = False
    """no gradient of the consistency loss into the main decoder (paper: open; released code: false; CCT: true)"""


class Method(nn.Module, ABC):
    """One module that holds all networks of a method, so that DDP or DeepSpeed can wrap it whole."""

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
