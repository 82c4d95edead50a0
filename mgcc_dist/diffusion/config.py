"""What the stages of the diffusion model are set by."""

from dataclasses import dataclass
from typing import Literal

from mgcc_dist.common.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UnitInterval
from mgcc_dist.train.config import LoopConfig

Solver = Literal["ddim", "dpm_solver++"]


@dataclass(frozen=True)
class DataConfig:
    shards: str | None = None
    """shard folder of real images, made by `python -m mgcc_dist.shards`; null makes `phantom` images in OUT/phantom"""
    phantom: NonNegativeInt = 0
    """images of the built-in phantom to make when there are no `shards`"""
    split: str | None = None
    """split file, or the name of one that ships with the package, such as busi_random_1; its labeled and unlabeled
    images are learned, its validation images never; null makes a 70/30 split in OUT/split.json"""
    image_size: PositiveInt = 512
    """pixels a side; images are stretched to a square (paper: 512)"""
    mirror: bool = False
    """show images mirrored half of the time (paper: silent); they are never turned, since the skin is on top"""
    workers: NonNegativeInt = 2
    """loader processes a rank; does not change what is loaded"""


@dataclass(frozen=True)
class AutoencoderConfig:
    loop: LoopConfig
    """how it is trained (paper: adam, learning rate 1e-6, 1000 epochs)"""
    channels: tuple[PositiveInt, ...] = (64, 128, 256, 512)
    """channels of each level; every level after the first halves the side (paper: 512 to 64, which is four levels)"""
    layers: PositiveInt = 2
    """residual blocks a level"""
    latent_channels: PositiveInt = 4
    """channels of the latent (paper: silent; Stable Diffusion: 4)"""
    norm_groups: PositiveInt = 32
    """groups of the group normalisation; divides every one of `channels`"""
    attention: bool = True
    """self-attention at the smallest side (Stable Diffusion: yes)"""
    kl_weight: NonNegativeFloat = 1e-6
    """weight of the KL term, counted in nats per pixel, beside the MSE per pixel (Stable Diffusion: 1e-6)"""
    batch: PositiveInt = 4
    """images a rank and micro-step (paper: 4)"""

    def __post_init__(self) -> None:
        for width in self.channels:
            if width % self.norm_groups:
                raise ValueError(
                    f"autoencoder.channels: {width} is not a multiple of autoencoder.norm_groups ({self.norm_groups})"
                )

    @property
    def downsampling(self) -> int:
        """Pixels of the image a side, per pixel of the latent."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class DenoiserConfig:
    loop: LoopConfig
    """how it is trained (paper: adamw, learning rate 1e-4, 1000 epochs)"""
    channels: tuple[PositiveInt, ...] = (224, 448, 672, 896)
    """channels of each level; every level after the first halves the side (paper: silent; the unconditional latent
    diffusion of [10] on 64x64 latents: 224, 448, 672, 896)"""
    attention: tuple[bool, ...] = (False, True, True, True)
    """which levels have self-attention ([10]: at sides 32, 16 and 8)"""
    layers: PositiveInt = 2
    """residual blocks a level ([10]: 2)"""
    norm_groups: PositiveInt = 32
    """groups of the group normalisation; divides every one of `channels`"""
    head_channels: PositiveInt = 32
    """channels of an attention head ([10]: 32)"""
    diffusion_steps: PositiveInt = 1000
    """T, the steps from image to noise (paper: 1000)"""
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    """how the noise grows, by diffusers' names (paper: silent; [10] and medfusion: scaled_linear)"""
    beta_start: PositiveFloat = 0.00085
    """variance added by the first step (paper: silent; Stable Diffusion: 0.00085; medfusion: 0.002)"""
    beta_end: PositiveFloat = 0.012
    """variance added by the last step (paper: silent; Stable Diffusion: 0.012; medfusion: 0.02, with which so little
    signal is left at t = T that a small error of the noise there decides the brightness of the whole image)"""
    batch: PositiveInt = 4
    """images a rank and micro-step (paper: 4)"""
    classes: bool = False
    """learn what each class of the shards looks like, and sample them by `sampling.guidance` (paper: no)"""
    label_dropout: UnitInterval = 0.1
    """share of labels withheld with `classes`, from which it learns images of any class (Ho & Salimans: 0.1 to 0.2)"""

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.channels):
            raise ValueError(
                f"denoiser.attention has {len(self.attention)} levels but denoiser.channels has {len(self.channels)}"
            )
        for width in self.channels:
            for key in ("norm_groups", "head_channels"):
                if width % getattr(self, key):
                    raise ValueError(f"denoiser.channels: {width} is not a multiple of denoiser.{key}")


@dataclass(frozen=True)
class SamplingConfig:
    count: PositiveInt = 725
    """synthetic images to make (paper: 725 for BUSI, which professionals chose out of more)"""
    sampler: Solver = "ddim"
    """how the latents are denoised (paper: ddim); dpm_solver++ needs a quarter of the steps"""
    steps: PositiveInt = 100
    """evaluations of the denoiser an image (paper: 100 of ddim); 20 to 25 for dpm_solver++"""
    guidance: NonNegativeFloat = 1.0
    """with `denoiser.classes`: how much the classes are exaggerated; 1 not at all, 0 ignores them; other values than
    these two double the time"""
    seed: NonNegativeInt = 0
    """of the noise that the images start from"""
    per_shard: PositiveInt = 64
    """images a shard; a rank makes a whole shard at a time, so make it some shards a rank"""
    batch: PositiveInt = 16
    """images made at once by a rank; changes speed and memory, and images by no more than rounding"""
    precision: Literal["no", "bf16"] | None = None
    """bf16 samples with bfloat16 weights; null where the training had bf16"""
    compile: bool = False
    """torch.compile both networks, on CUDA into graphs: worth its minute from some hundred images on"""
