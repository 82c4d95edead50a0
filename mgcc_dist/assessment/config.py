"""Config dataclasses of quality, audit and curation."""

from dataclasses import dataclass

from mgcc_dist.common.value_types import File, FileOrFolder, Folder, Name, PositiveInt, UnitInterval


@dataclass(frozen=True)
class QualityConfig:
    enabled: bool = True
    """compare the synthetic images with the real validation images"""
    encoder: FileOrFolder | None = None
    """feature extractor for quality, audit and curation: folder of a trained segmentation run, its model.safetensors,
    or a TorchScript file that maps [B,1,S,S] in [-1,1] to [B,D] (loading it executes code: only use files that you
    trust). null uses the encoder of the diffusion model's own autoencoder; the audit then compares pixels only"""
    neighbours: PositiveInt = 5
    """k of precision, recall, density and coverage (Kynkaanniemi et al.: 3, Naeem et al.: 5)"""
    halves: PositiveInt = 50
    """number of random halves for the floor and the intervals"""


@dataclass(frozen=True)
class AuditConfig:
    enabled: bool = True
    """search the synthetic images for copies of training images"""
    false_alarms: UnitInterval = 0.01
    """accepted false-alarm rate: share of real images that would be listed as copies of another patient's image; sets
    the thresholds"""
    drop_copies: bool = False
    """remove near-copies from the shards; by default they are only listed"""


@dataclass(frozen=True)
class FilterConfig:
    run: FileOrFolder | None = None
    """drop pairs on which this segmentation run on real images disagrees with the mask, and write the others to
    OUT/pairs; its folder or a model.safetensors, for `denoiser.masks`"""
    quantile: UnitInterval = 0.2
    """share of the real validation images on which the run agrees less with the mask than it must on a pair"""


@dataclass(frozen=True)
class CurateConfig:
    out: Folder
    """output folder of a finished `mgcc ldm` run; page.html and proposal.json are written to OUT/curation/"""
    name: Name = ""
    """`sampling.name` of the samples"""
    count: PositiveInt = 725
    """number of images to propose (paper: 725 for BUSI)"""
    neighbours: PositiveInt = 5
    """k of the k-NN density that measures how realistic an image is"""


@dataclass(frozen=True)
class ApplyConfig:
    selection: File
    """selection.json, as saved by the page of `curate`"""
    samples: Folder
    """shard folder of the samples to select from, such as OUT/samples; it is not changed"""
    out: Folder
    """shard folder to write, for `mgcc segment --data.synthetic`"""
