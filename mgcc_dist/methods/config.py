"""Which training method, and what it is set by."""

from dataclasses import dataclass
from typing import Literal

from mgcc_dist.common.config import NonNegativeInt, PositiveFloat, UnitInterval
from mgcc_dist.train.schedules import Ramp


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
