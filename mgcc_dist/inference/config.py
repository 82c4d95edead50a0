"""Options of `mgcc predict`."""

from dataclasses import dataclass
from typing import Literal

from mgcc_dist.common.options import flag
from mgcc_dist.common.value_types import FolderPath, NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class PredictConfig:
    run: FolderPath
    """folder of a segmentation run"""
    images: FolderPath
    """folder of images, with any subfolders"""
    out: FolderPath
    """output folder; new, or of the same prediction"""
    weights: Literal["best", "last"] = "best"
    """best: highest validation score; last: last step"""
    batch: PositiveInt = 8
    """images per forward pass, as memory allows"""
    workers: NonNegativeInt = 2
    """processes that read images; 0 for none"""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """implementations of the fused layers; see mgcc_dist.kernels.dispatcher"""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """auto: bf16 where supported; no: float32"""
    skip_bad: bool = flag()
    """list unreadable images in skipped.csv and continue"""
    overwrite: bool = flag()
    """predict all images again, also with other images or weights; refuses if files were changed by hand"""
