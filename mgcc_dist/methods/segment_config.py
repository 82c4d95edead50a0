"""What one segmentation run is: read by the program that trains it, and by the report that looks for it."""

from dataclasses import dataclass, field
from typing import Literal

from mgcc_dist.common.config import NonNegativeInt, PositiveInt
from mgcc_dist.methods.config import MethodConfig
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.train.config import LoopConfig


@dataclass(frozen=True)
class DataConfig:
    shards: str
    """shard folder of the labeled data set, made by `python -m mgcc_dist.shards`"""
    split: str
    """split file, or the name of one that ships with the package, such as busi_random_1"""
    labels: Literal["half", "all"] = "half"
    """which training images keep their labels: the half that the split marks (Tables I to III) or all (Table IV)"""
    unlabeled: bool = True
    """use the training images without labels as unlabeled images (with labels: all there are none)"""
    synthetic: str | None = None
    """shard folder of generated images, which become unlabeled images too (Tables III and IV)"""
    similar: tuple[str, ...] = ()
    """shard folders of other data sets, all of whose images become unlabeled images too (Table II)"""
    external: tuple[str, ...] = ()
    """shard folders of other labeled data sets, on which the finished network is scored too, never trained"""
    image_size: PositiveInt = 256
    """pixels a side; images are stretched to a square (paper: 256)"""
    batch_labeled: PositiveInt = 4
    """labeled images a rank and micro-step (paper: 4)"""
    batch_unlabeled: NonNegativeInt = 4
    """unlabeled images a rank and micro-step (paper: 4); 0 for method.name supervised"""
    workers: NonNegativeInt = 2
    """loader processes a rank; does not change what is loaded"""


@dataclass(frozen=True)
class SegmentConfig:
    data: DataConfig
    loop: LoopConfig
    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """forms of up-convolutions, gates and ConvMixer layers: triton (where it can), torch (up-convolutions by phases),
    or auto, what was measured on this device to be at least as fast as the plain module"""
    out: str = "out/segment"
    """run folder"""
