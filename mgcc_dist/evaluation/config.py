"""Options of `mgcc evaluate`."""

from dataclasses import dataclass
from typing import Literal

from mgcc_dist.common.options import argument, flag
from mgcc_dist.common.value_types import (
    FileOrName,
    Folder,
    FolderPath,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RunOrModel,
)


@dataclass(frozen=True)
class EvaluateConfig:
    runs: tuple[RunOrModel, ...] = argument(nargs="+", alias="models")
    """folder of a segmentation run or model, or a shipped model by name (mgcc list models); of several, the mean
    probability is evaluated (an ensemble)"""
    shards: tuple[Folder, ...] = argument(nargs="+")
    """shard folder or its URL, or several"""
    out: FolderPath = argument()
    """output folder; new, or of the same evaluation"""
    split: FileOrName | None = None
    """split file, or name of a shipped one; none: all images of the shard folders"""
    subset: str | None = None
    """subset of the split: validation, test, labeled or unlabeled; none: validation"""
    weights: Literal["best", "last"] = "best"
    """best: highest validation score; last: last step"""
    tta: tuple[Literal["flips", "scales"], ...] = argument((), nargs="+")
    """test-time augmentation: mean over mirrored images (flips), over three image sizes (scales), or both"""
    threshold: str = "0.5"
    """probability above which a pixel is lesion; choose: the best of 0.05, 0.1, ... 0.95 on the evaluated images; a
    folder: what that evaluation chose"""
    postprocess: str = "none"
    """words of fill,min=SHARE,largest (fill holes; drop components below this share of the image; keep the largest);
    choose: the best of these on the evaluated images; a folder: what that evaluation chose"""
    uncertainty: Literal["decoders", "tta", "ensemble"] | None = None
    """score each image by how well the predictions of the network's decoders, of mirrored images, or of several runs
    agree, and add a risk-coverage curve by it; decoders are in a run's checkpoint, so they need --weights last"""
    members: tuple[RunOrModel, ...] = argument((), nargs="+")
    """further runs of --uncertainty ensemble, which are not evaluated"""
    fit_temperature: bool = flag()
    """fit a temperature to the validation images and store it as calibration.json next to the run's weights"""
    calibrated: bool = flag()
    """apply that temperature to the probabilities; masks do not change"""
    corruptions: bool = flag()
    """also score images with speckle, gain, blur, shadow, JPEG and down-sampling, at five strengths each (pip install
    'mgcc-dist[augment]')"""
    seed: NonNegativeInt = 0
    """random seed of the corruptions"""
    tolerance: PositiveFloat = 2.0
    """tolerance of NSD, in pixels, and in mm where the pixel spacing is known"""
    size: PositiveInt | None = None
    """score squares of this size, as in training, instead of images of their stored sizes; the size a run was trained
    at reproduces its own scores"""
    batch: PositiveInt = 8
    """images per forward pass, as memory allows"""
    workers: NonNegativeInt = 2
    """processes that read images; 0 for none"""
    cache: Folder | None = None
    """folder on a disk of this node to which shards are copied before they are read; none copies only shards at URLs,
    to $SLURM_TMPDIR or $TMPDIR"""
    cache_gb: NonNegativeFloat = 0.0
    """limit of the size of --cache in GB, 0 for none"""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """implementation of up-convolutions, gates and ConvMixer layers, as in mgcc segment"""
    precision: Literal["auto", "no", "bf16"] = "no"
    """no: float32; auto: bf16 where supported"""

    @property
    def evaluated(self) -> str | None:
        """The subset that is evaluated; None without a split, which means all images."""
        return (self.subset or "validation") if self.split else None
