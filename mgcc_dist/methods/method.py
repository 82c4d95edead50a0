"""What a training method is: networks, and the losses of one batch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from mgcc_dist.common.config import NonNegativeInt, PositiveFloat, UnitInterval
from mgcc_dist.common.errors import UserError
from mgcc_dist.models import NetworkConfig
from mgcc_dist.train.schedules import Progress, Ramp

if TYPE_CHECKING:
    from mgcc_dist.data.loader import Batch


ONE_DECODER = ("unet", "cmunet", "swin_unet")  # values of network.name without auxiliary decoders


@dataclass(frozen=True)
class MethodConfig:
    name: str = "mgcc"
    """supervised (labeled images alone, any network); mean_teacher, uamt, dct, cps (any network without auxiliary
    decoders); ctbct (network unet, beside a Swin-UNet of the same section's keys); cct, mgcc, cutmix_teacher"""
    ramp: Ramp = "released"
    """weight of the loss on unlabeled images over the run: released is 7 exp(-5 (1 - t/200)^2) with t = step // 150, as
    in MGCC's released code; ssl4mis the same with 0.1 instead of 7, as in the baselines' code; compressed and
    ssl4mis_compressed are those of a 20,000-step run fitted to this run's length; paper_0.1 is
    0.1 exp(-5 (1 - step/steps)^2) (the paper gives no highest weight)"""
    detach_target: bool = False
    """cct, mgcc: no gradient of the consistency loss into the main decoder (paper: open; released code and SSL4MIS:
    false; CCT's original: true)"""
    teacher_decay: UnitInterval = 0.9
    """mean_teacher, uamt, cutmix_teacher: decay of the teacher's weights (paper: 0.9; SSL4MIS: 0.99)"""
    teacher_start: NonNegativeInt = 1000
    """mean_teacher: optimizer steps before which the consistency loss has weight 0 (SSL4MIS: 1000)"""
    views: Literal["rotation", "two_networks"] = "rotation"
    """dct: an image and itself rotated, one network (SSL4MIS, and so the paper's tables), or two networks that are kept
    apart by adversarial examples (Qiao et al. 2018)"""
    adversarial_step: PositiveFloat = 0.02
    """dct with two networks: step of the adversarial examples, in the images' range of [-1,1]"""


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
