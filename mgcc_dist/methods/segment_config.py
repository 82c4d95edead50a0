"""Configuration of a segmentation run, read by `segment`, which trains it, and by `report`, which looks for it."""

from dataclasses import dataclass, field
from typing import Literal

from mgcc_dist.common.options import data_input, neutral
from mgcc_dist.common.value_types import FileOrFolder, FileOrName, Folder, NonNegativeFloat, NonNegativeInt, PositiveInt
from mgcc_dist.methods.config import MethodConfig, MultiLevelCrossConsistencyConfig
from mgcc_dist.models.config import MGCCConfig, NetworkConfig
from mgcc_dist.train.config import LoopConfig


@dataclass(frozen=True)
class DataConfig:
    shards: Folder = data_input()
    """shard folder of the labeled data set, written by `mgcc shards`, or its URL (docs/how-to/datasets.md)"""
    split: FileOrName = data_input()
    """split file, or the name of a shipped split such as busi_random_1"""
    labels: Literal["half", "all"] = "half"
    """training images that keep their labels: the half marked in the split (Tables I to III) or all that have a mask
    (Table IV)"""
    unlabeled: bool = True
    """train on the training images without labels as unlabeled images (with labels all: those without a mask)"""
    synthetic: Folder | None = data_input(None)
    """shard folder of synthetic images, used as unlabeled images, unlike data.synthetic_labeled
    (Tables III and IV)"""
    synthetic_labeled: Folder | None = data_input(None)
    """shard folder of synthetic images with masks (`mgcc ldm` with denoiser.masks), used as labeled images"""
    similar: tuple[Folder, ...] = data_input(())
    """shard folders of other data sets, whose images are all added to the unlabeled images (Table II)"""
    external: tuple[Folder, ...] = data_input(())
    """shard folders of other labeled data sets, on which the trained network is also scored; never trained on"""
    image_size: PositiveInt = 256
    """side of the square that the network sees, in pixels (paper: 256)"""
    fit: Literal["stretch", "letterbox", "crop", "released"] = "stretch"
    """how images become square. stretch: resized whatever their proportions (paper); letterbox: proportions kept,
    the rest black; crop: the largest square in the middle; released: as stretch, without antialiasing. letterbox and
    crop are scored at each image's own size"""
    augment: Literal["symmetries", "released", "ultrasound"] = "symmetries"
    """random changes of training images. symmetries: rotation by quarter turns and flips, all equally often (paper);
    released: the same as often as in the released code, which leaves more images upright; ultrasound: mirrored, scaled,
    shifted, rotated by up to 15 degrees, deformed, with speckle, shadows, blur, gain, time-gain, gamma and JPEG
    (pip install 'mgcc-dist[augment]')"""
    batch_labeled: PositiveInt = 4
    """labeled images per rank and micro-step (paper: 4)"""
    batch_synthetic: PositiveInt = 4
    """images of `synthetic_labeled` per rank and micro-step, next to the batch_labeled real ones"""
    batch_unlabeled: NonNegativeInt = 4
    """unlabeled images per rank and micro-step (paper: 4); 0 for method.name supervised"""
    workers: NonNegativeInt = neutral(2)
    """data loader processes per rank; does not change the result"""
    shard_window: PositiveInt | None = None
    """for data larger than `cache_gb`: read this many shards at a time, in random order, and shuffle images among them;
    null shuffles all images"""
    cache: Folder | None = neutral(None)
    """folder on a disk of this node to which shards are copied before they are read, such as $SLURM_TMPDIR; null copies
    only shards at URLs, to $SLURM_TMPDIR or $TMPDIR"""
    cache_gb: NonNegativeFloat = neutral(0.0)
    """limit of the size of `cache` in GB, 0 for none; the least recently used copies that no process has open are
    deleted"""


@dataclass(frozen=True)
class SegmentConfig:
    data: DataConfig
    """data"""
    loop: LoopConfig
    """training"""
    network: NetworkConfig = field(default_factory=MGCCConfig)
    """network"""
    method: MethodConfig = field(default_factory=MultiLevelCrossConsistencyConfig)
    """method"""
    kernels: Literal["auto", "torch", "triton"] = neutral("auto")
    """implementation of up-convolutions, gates and ConvMixer layers. triton: Triton kernels where supported; torch:
    PyTorch, up-convolutions by phases; auto: whichever a benchmark on this device showed to be at least as fast as the
    plain module"""
    init: FileOrFolder | None = data_input(None)
    """start from the trained network of another run: its folder (best weights), its best/ or last/, or a
    model.safetensors. Optimizer and schedule start from the beginning; what the file does not hold (auxiliary decoders,
    a second network) starts from random weights"""
    out: Folder = neutral("out/segment")
    """run folder"""

    @property
    def fixed_length(self) -> str:
        """Why a run can't be extended; "" if it can."""
        return self.loop.fixed_length or self.method.fixed_length

    def __post_init__(self) -> None:
        self.method.check_network(self.network)
        size, divisor = self.data.image_size, self.method.size_divisor(self.network)
        if size % divisor:
            below, above = size // divisor * divisor, (size // divisor + 1) * divisor
            raise ValueError(
                f"data.image_size: {size} is not a multiple of {divisor}, which method {self.method.name} with network "
                f"{self.network.name} needs. Set it to {f'{below} or ' if below else ''}{above}, or change the "
                "network's levels."
            )
