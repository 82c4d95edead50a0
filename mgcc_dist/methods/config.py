"""Configuration of a training method."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from mgcc_dist.common.value_types import NonNegativeInt, PositiveFloat, UnitInterval
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.train.schedules import Ramp

MethodName = Literal["supervised", "mean_teacher", "uamt", "dct", "cps", "ctbct", "cct", "mgcc", "cutmix_teacher"]


@dataclass(frozen=True)
class MethodConfig:
    name: MethodName = "mgcc"
    """training method: supervised (labeled images only, any network); mean_teacher, uamt, dct, cps (any network without
    auxiliary decoders); ctbct (network unet, trained with a Swin-UNet); cct (network cct); mgcc (network mgcc);
    cutmix_teacher (network mgcc or cct)"""
    ramp: Ramp = "released"
    """ramp of the consistency loss's weight. released: 7 exp(-5 (1 - t/200)^2) with t = step // 150, as in MGCC's
    released code; ssl4mis: the same with 0.1 instead of 7, as in the baselines' code; compressed, ssl4mis_compressed:
    those of a 20,000-step run scaled to this run's length; paper_0.1: 0.1 exp(-5 (1 - step/steps)^2) (the paper does
    not give the maximum weight)"""
    detach_target: bool = False
    """cct, mgcc: stop the consistency loss's gradient into the main decoder (paper: not specified; released code and
    SSL4MIS: false; original CCT: true)"""
    teacher_decay: UnitInterval = 0.9
    """mean_teacher, uamt, cutmix_teacher: EMA decay of the teacher's weights (paper: 0.9; SSL4MIS: 0.99)"""
    teacher_start: NonNegativeInt = 1000
    """mean_teacher: optimizer steps for which the consistency weight stays 0 (SSL4MIS: 1000)"""
    views: Literal["rotation", "two_networks"] = "rotation"
    """dct: the two views. rotation: an image and its rotation, one network (SSL4MIS, used for the paper's tables);
    two_networks: two networks, kept different by adversarial examples (Qiao et al. 2018)"""
    adversarial_step: PositiveFloat = 0.02
    """dct with two_networks: step size of the adversarial examples, in image units of [-1,1]"""

    @property
    def fixed_length(self) -> str:
        """Why a run can't be extended; "" if its steps do not depend on how many there are."""
        if self.name == "uamt":
            return "method uamt depends on the length of the run"
        if self.name == "supervised" or self.ramp in ("released", "ssl4mis"):
            return ""
        return f"method.ramp {self.ramp} depends on the length of the run"

    def size_divisor(self, network: NetworkConfig) -> int:
        """The image size must be a multiple of this, for all networks of the method."""
        if self.name == "ctbct":
            return math.lcm(network.size_divisor, replace(network, name="swin_unet").size_divisor)
        return network.size_divisor
