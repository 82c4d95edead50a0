"""What quality, audit and curation are set by."""

from dataclasses import dataclass

from mgcc_dist.common.config import PositiveInt, UnitInterval


@dataclass(frozen=True)
class QualityConfig:
    enabled: bool = True
    """measure the synthetic images against the held-out real ones"""
    encoder: str | None = None
    """what compares images here, in the audit and in curation: folder of a trained segmentation run, a
    model.safetensors of one, or a TorchScript file that maps [B,1,S,S] in [-1,1] to [B,D] (which is a program: name
    only files that you trust); null takes the encoder of the diffusion model's own autoencoder, and the audit then
    compares pixels alone"""
    neighbours: PositiveInt = 5
    """k of precision, recall, density and coverage (Kynkaanniemi et al.: 3, Naeem et al.: 5)"""
    halves: PositiveInt = 50
    """random halves for floor and intervals"""


@dataclass(frozen=True)
class AuditConfig:
    enabled: bool = True
    """look for copies of training images among the synthetic ones"""
    false_alarms: UnitInterval = 0.01
    """share of real images that would be taken for copies of another patient's; sets the thresholds"""
    drop_copies: bool = False
    """take the near-copies out of the shards; otherwise they are only listed"""


@dataclass(frozen=True)
class CurateConfig:
    out: str
    """folder of a finished `mgcc_dist.ldm` run; OUT/curation/ gets page.html and proposal.json"""
    count: PositiveInt = 725
    """images to propose (paper: 725 for BUSI)"""
    neighbours: PositiveInt = 5
    """k of the k-NN density that says how realistic an image is"""


@dataclass(frozen=True)
class ApplyConfig:
    selection: str
    """selection.json, as the page of `curate` saves it"""
    samples: str
    """shard folder of the samples that it is of, such as OUT/samples; stays as it is"""
    out: str
    """shard folder to write, for `mgcc_dist.segment --data.synthetic`"""
