"""Configs of the training methods: which there are, their keys, and what each needs of its network."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mgcc_dist.common.components import Registry
from mgcc_dist.common.value_types import NonNegativeFloat, NonNegativeInt, PositiveFloat, UnitInterval
from mgcc_dist.models.config import NetworkConfig, SwinUNetConfig
from mgcc_dist.train.schedules import Ramp


@dataclass(frozen=True)
class MethodConfig:
    """A method's name, keys, and what it needs of the network that it trains."""

    name: str
    """training method; `mgcc list methods` describes them"""

    needs_auxiliary_outputs: ClassVar[bool | None] = None
    """whether its network must have auxiliary outputs (True) or must have none (False); None: either"""

    needs_encoder_features: ClassVar[bool] = False
    """whether its network must let it change the features between encoder and decoder"""

    @property
    def fixed_length(self) -> str:
        """Why a run can't be extended; "" if its steps do not depend on how many there are."""
        return ""

    def networks(self, network: NetworkConfig) -> tuple[NetworkConfig, ...]:
        """Return the configs of the networks that it builds, given that of the section `network`."""
        return (network,)

    def size_divisor(self, network: NetworkConfig) -> int:
        """The image size must be a multiple of this, for all networks of the method."""
        return math.lcm(*(each.size_divisor for each in self.networks(network)))

    def check_network(self, network: NetworkConfig) -> None:
        """Check that the method can train `network`.

        Raises:
            ValueError: it can't.
        """
        if self.needs_auxiliary_outputs not in (None, network.auxiliary_outputs > 0):
            needed = "with" if self.needs_auxiliary_outputs else "without"
            raise ValueError(
                f"network.name: method {self.name} needs a network {needed} auxiliary outputs, and {network.name} has "
                f"{network.auxiliary_outputs or 'none'}. `mgcc list networks` lists them."
            )
        if self.needs_encoder_features and not network.has_encoder_features:
            raise ValueError(
                f"network.name: method {self.name} needs a network with separate encoder and decoder, such as unet, "
                f"and {network.name} has none. `mgcc list networks` lists them."
            )


@dataclass(frozen=True)
class SupervisedLossConfig(MethodConfig):
    """Keys of methods that have the loss 0.5 BCE + Dice (Eq. 10) on labeled images."""

    dice_smooth: UnitInterval = 0.0
    """share of the image's area, added to both sides of the Dice's ratio (released code: 0, and 1e-5 pixels).
    About 0.01 teaches the network to leave images without a lesion empty, which 0 hardly does: docs/results"""


@dataclass(frozen=True)
class SemiSupervisedConfig(SupervisedLossConfig):
    """Keys of methods with a consistency loss."""

    ramp: Ramp = "released"
    """ramp of the consistency loss's weight. released: 7 exp(-5 (1 - t/200)^2) with t = iteration // 150, as in MGCC's
    released code, an iteration being 4 labeled images on any number of ranks; ssl4mis: the same with 0.1 instead of 7,
    as in the baselines' code; compressed, ssl4mis_compressed: those of a run of 20,000 iterations scaled to this run's
    length; paper_0.1: 0.1 exp(-5 (1 - step/steps)^2) (the paper does not give the maximum weight)"""

    @property
    def fixed_length(self) -> str:
        return (
            "" if self.ramp in ("released", "ssl4mis") else f"method.ramp {self.ramp} depends on the length of the run"
        )


@dataclass(frozen=True)
class SupervisedConfig(SupervisedLossConfig):
    """Supervised training on the labeled images only; any network."""

    name: Literal["supervised"] = "supervised"


@dataclass(frozen=True)
class MeanTeacherConfig(SemiSupervisedConfig):
    """Mean teacher, MT (Tarvainen & Valpola 2017)."""

    name: Literal["mean_teacher"] = "mean_teacher"
    teacher_decay: UnitInterval = 0.9
    """EMA decay of the teacher's weights (paper: 0.9; SSL4MIS: 0.99)"""
    teacher_start: NonNegativeInt = 1000
    """iterations of 4 labeled images for which the consistency weight stays 0 (SSL4MIS: 1000 steps)"""
    needs_auxiliary_outputs = False


@dataclass(frozen=True)
class UncertaintyAwareMeanTeacherConfig(SemiSupervisedConfig):
    """Uncertainty-aware mean teacher, UA-MT (Yu et al. 2019)."""

    name: Literal["uamt"] = "uamt"
    teacher_decay: UnitInterval = 0.9
    """EMA decay of the teacher's weights (paper: 0.9; SSL4MIS: 0.99)"""
    needs_auxiliary_outputs = False

    @property
    def fixed_length(self) -> str:
        return "method uamt depends on the length of the run"


@dataclass(frozen=True)
class DeepCoTrainingConfig(SemiSupervisedConfig):
    """Deep co-training, DCT (Qiao et al. 2018)."""

    name: Literal["dct"] = "dct"
    views: Literal["rotation", "two_networks"] = "rotation"
    """the two views. rotation: an image and its rotation, one network (SSL4MIS, used for the paper's tables);
    two_networks: two networks, kept different by adversarial examples (Qiao et al. 2018)"""
    adversarial_step: PositiveFloat = 0.02
    """with two_networks: step size of the adversarial examples, in image units of [-1,1]"""
    needs_auxiliary_outputs = False


@dataclass(frozen=True)
class CrossPseudoSupervisionConfig(SemiSupervisedConfig):
    """Cross pseudo supervision, CPS (Chen et al. 2021): two networks of the same architecture."""

    name: Literal["cps"] = "cps"
    needs_auxiliary_outputs = False


@dataclass(frozen=True)
class CrossTeachingConfig(SemiSupervisedConfig):
    """Cross teaching between CNN and transformer, CTBCT (Luo et al. 2022)."""

    name: Literal["ctbct"] = "ctbct"
    swin_unet: SwinUNetConfig = field(default_factory=SwinUNetConfig)
    """second network of ctbct"""
    needs_auxiliary_outputs = False

    def networks(self, network: NetworkConfig) -> tuple[NetworkConfig, ...]:
        return (network, self.swin_unet)


@dataclass(frozen=True)
class CrossConsistencyTrainingConfig(SemiSupervisedConfig):
    """Cross-consistency training, CCT (Ouali et al. 2020)."""

    name: Literal["cct"] = "cct"
    detach_target: bool = False
    """stop the consistency loss's gradient into the main decoder (SSL4MIS: false; original CCT: true)"""
    needs_auxiliary_outputs = True


@dataclass(frozen=True)
class MultiLevelCrossConsistencyConfig(SemiSupervisedConfig):
    """Multi-level global context cross-consistency, the paper's method."""

    name: Literal["mgcc"] = "mgcc"
    detach_target: bool = False
    """stop the consistency loss's gradient into the main decoder (paper: not specified; released code: false)"""
    needs_auxiliary_outputs = True


@dataclass(frozen=True)
class CutMixTeacherConfig(SemiSupervisedConfig):
    """The paper's network with a CutMix mean teacher. Not in the paper."""

    name: Literal["cutmix_teacher"] = "cutmix_teacher"
    teacher_decay: UnitInterval = 0.9
    """EMA decay of the teacher's weights (mean teachers in the paper: 0.9; in SSL4MIS: 0.99)"""
    needs_auxiliary_outputs = True


@dataclass(frozen=True)
class WeakToStrongConfig(SupervisedLossConfig):
    """Keys of methods that learn the confident pseudo-masks of a weak view on strong views."""

    confidence: UnitInterval = 0.95
    """pixels of the weak view train the strong one if their probability of lesion or of background is at least this
    (FixMatch, UniMatch: 0.95)"""
    cutmix: UnitInterval = 0.5
    """share of the strong views into which a box of another unlabeled image is pasted (UniMatch: 0.5)"""
    pseudo_loss: Literal["bce", "dice"] = "bce"
    """loss on confident pixels. bce: the sum of their cross-entropy, divided by the number of all pixels (FixMatch,
    UniMatch); dice: Dice of lesion and background over the batch (UniMatch's code for medical images)"""
    unlabeled_weight: NonNegativeFloat = 1.0
    """weight of the loss on unlabeled images, without a ramp (FixMatch, UniMatch: 1)"""
    needs_auxiliary_outputs = False


@dataclass(frozen=True)
class FixMatchConfig(WeakToStrongConfig):
    """FixMatch (Sohn et al. 2020) for segmentation, as in UniMatch's code (Yang et al. 2023).

    The original has a softmax over classes. Here one sigmoid channel p stands for the two classes (p, 1 - p), which has
    the same cross-entropy; the confidence is the larger of the two. Labeled images have the loss of all methods,
    0.5 BCE + Dice. The original halves the total loss; here it is not halved. CutMix boxes and their pseudo-masks come
    from the previous image of the same batch, not from a second batch predicted in evaluation mode.
    """

    name: Literal["fixmatch"] = "fixmatch"


@dataclass(frozen=True)
class UniMatchConfig(WeakToStrongConfig):
    """UniMatch (Yang et al. 2023), the first version: FixMatch with two strong views and perturbed features.

    Adapted to one sigmoid channel as FixMatch is. Channels are dropped on all levels of the encoder's features, as in
    the original's U-Net.
    """

    name: Literal["unimatch"] = "unimatch"
    feature_dropout: UnitInterval = 0.5
    """share of the channels set to zero in the feature stream (UniMatch: 0.5)"""
    needs_encoder_features = True


@dataclass(frozen=True)
class BidirectionalCopyPasteConfig(MethodConfig):
    """Bidirectional copy-paste, BCP (Bai et al. 2023).

    The original has a softmax over classes. Here one sigmoid channel p stands for the two classes (p, 1 - p), which has
    the same cross-entropy and Dice. The original gives half of a batch to each direction; here every image is in both,
    and the teacher predicts all unlabeled images at once. Its two stages are one run with one schedule: the second
    continues from the last weights of the first, not from its best. Components touch along edges, not only corners.
    """

    name: Literal["bcp"] = "bcp"
    teacher_decay: UnitInterval = 0.99
    """EMA decay of the teacher's weights (BCP: 0.99)"""
    unlabeled_weight: NonNegativeFloat = 0.5
    """weight of the loss on pixels of unlabeled images (BCP: 0.5, without a ramp)"""
    pretraining: UnitInterval = 0.25
    """share of the run, at its start, that trains on labeled images pasted into each other (BCP: 10,000 of 40,000
    steps); 0 with `init` from a trained network"""
    needs_auxiliary_outputs = False

    @property
    def fixed_length(self) -> str:
        return "method.pretraining depends on the length of the run" if self.pretraining else ""


METHODS = Registry("method", MethodConfig, default="mgcc")
METHODS.register(SupervisedConfig, "mgcc_dist.methods.supervised:Supervised")
METHODS.register(MeanTeacherConfig, "mgcc_dist.methods.mean_teacher:MeanTeacher")
METHODS.register(UncertaintyAwareMeanTeacherConfig, "mgcc_dist.methods.uamt:UncertaintyAwareMeanTeacher")
METHODS.register(DeepCoTrainingConfig, "mgcc_dist.methods.dct:DeepCoTraining")
METHODS.register(CrossPseudoSupervisionConfig, "mgcc_dist.methods.cps:CrossPseudoSupervision")
METHODS.register(CrossTeachingConfig, "mgcc_dist.methods.ctbct:CrossTeaching")
METHODS.register(CrossConsistencyTrainingConfig, "mgcc_dist.methods.cct:CrossConsistencyTraining")
METHODS.register(MultiLevelCrossConsistencyConfig, "mgcc_dist.methods.mgcc:MultiLevelCrossConsistency")
METHODS.register(CutMixTeacherConfig, "mgcc_dist.methods.cutmix_teacher:CutMixTeacher")
METHODS.register(FixMatchConfig, "mgcc_dist.methods.fixmatch:FixMatch")
METHODS.register(UniMatchConfig, "mgcc_dist.methods.unimatch:UniMatch")
METHODS.register(BidirectionalCopyPasteConfig, "mgcc_dist.methods.bcp:BidirectionalCopyPaste")
