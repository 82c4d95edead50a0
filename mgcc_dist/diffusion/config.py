"""Config dataclasses of the latent diffusion model."""

from dataclasses import dataclass, field
from typing import Literal

from mgcc_dist.common.components import Registry
from mgcc_dist.common.options import data_input, neutral
from mgcc_dist.common.value_types import (
    FileOrFolder,
    FileOrName,
    Folder,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitInterval,
)
from mgcc_dist.train.config import LoopConfig

STAGES = (
    *("autoencoder", "audit", "curation", "denoiser", "latents", "phantom", "pipeline", "quality", "samples"),
    *("filter", "pairs", "stages"),
)
"""folders of OUT; no set of samples may have such a name"""
Masks = Literal["none", "labeled", "all"]
Objective = Literal["epsilon", "v_prediction", "flow"]
Solver = Literal["ddim", "dpm_solver++", "euler"]


@dataclass(frozen=True)
class DataConfig:
    shards: Folder | None = data_input(None)
    """shard folder of real images, written by `mgcc shards`, or its URL (docs/how-to/datasets.md); null generates
    phantom images in OUT/phantom"""
    phantom: NonNegativeInt = 0
    """number of phantom images to generate when `shards` is null"""
    split: FileOrName | None = data_input(None)
    """split file, or the name of a split that ships with the package, such as busi_random_1. Its labeled and unlabeled
    images are the training set, its validation images the validation set; null creates a 70/30 split in
    OUT/split.json"""
    image_size: PositiveInt = 512
    """pixels per side; images are stretched to a square (paper: 512)"""
    mirror: bool = False
    """flip images horizontally with probability 0.5 (paper: not stated); images are never rotated, because the skin is
    at the top"""
    workers: NonNegativeInt = neutral(2)
    """loader processes per rank; does not affect which samples are loaded"""
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
class AdversarialConfig:
    """Discriminator of patches (PatchGAN)"""

    weight: NonNegativeFloat = 0.0
    """weight of the adversarial term, about 0.001; 0: no discriminator"""
    start: NonNegativeInt = 0
    """optimizer steps before the discriminator joins; give the reconstructions time to take shape"""
    learning_rate_factor: PositiveFloat = 1.0
    """learning rate of the discriminator, relative to that of the autoencoder"""
    channels: PositiveInt = 64
    """channels of the discriminator's first layer, a multiple of 8; later layers double them (Isola et al.: 64)"""
    layers: PositiveInt = 3
    """layers of the discriminator; more judge larger patches (Isola et al.: 3, patches of 70x70 pixels)"""

    def __post_init__(self) -> None:
        if self.channels % 8:
            raise ValueError(f"adversarial.channels: {self.channels} is not a multiple of 8")

    @property
    def least_size(self) -> int:
        """Side in pixels of the smallest image that leaves one patch to judge."""
        return 3 * 2**self.layers


@dataclass(frozen=True)
class ReconstructionConfig:
    """Terms of the loss next to the MSE, which has weight 1 (paper: none)"""

    ssim: NonNegativeFloat = 0.0
    """weight of 1 - SSIM"""
    spectral: NonNegativeFloat = 0.0
    """weight of the difference in dB of local power spectra, about 0.002; keeps speckle"""
    features: NonNegativeFloat = 0.0
    """weight of the distance in features of `network`"""
    network: FileOrFolder | None = data_input(None)
    """network of the feature term: folder of a trained segmentation run, its model.safetensors, or a TorchScript file
    that maps [B,1,S,S] in [-1,1] to a feature map [B,D,h,w] or a list of them (loading it executes code: only use files
    that you trust)"""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)

    def __post_init__(self) -> None:
        if bool(self.features) != (self.network is not None):
            raise ValueError(
                f"losses.features and losses.network: expected both or neither, got {self.features:g} and "
                f"{self.network or 'null'}"
            )


@dataclass(frozen=True)
class AutoencoderConfig:
    """Keys that all autoencoders have."""

    loop: LoopConfig
    """autoencoder training (paper: adam, learning rate 1e-6, 1000 epochs)"""
    name: str
    """architecture; `mgcc list autoencoders` describes them"""
    latent_channels: PositiveInt = 4
    """channels of the latent (paper: not stated; Stable Diffusion: 4)"""
    kl_weight: NonNegativeFloat = 1e-6
    """weight of the KL term, in nats per pixel, relative to the MSE per pixel (Stable Diffusion: 1e-6)"""
    batch: PositiveInt = 4
    """images per rank and micro-step (paper: 4)"""
    init: FileOrFolder | None = data_input(None)
    """start from another autoencoder's weights: OUT/autoencoder of another run, or a model.safetensors"""
    losses: ReconstructionConfig = field(default_factory=ReconstructionConfig)

    @property
    def downsampling(self) -> int:
        """Ratio of the image size to the latent size, per side."""
        raise NotImplementedError(f"autoencoder {self.name} does not define its downsampling")


@dataclass(frozen=True)
class KLAutoencoderConfig(AutoencoderConfig):
    """diffusers' AutoencoderKL, as in Stable Diffusion."""

    name: Literal["kl"] = "kl"
    channels: tuple[PositiveInt, ...] = (64, 128, 256, 512)
    """channels per level; each level after the first halves the image size (paper: 512 to 64 pixels, i.e. 4 levels)"""
    layers: PositiveInt = 2
    """residual blocks per level"""
    norm_groups: PositiveInt = 32
    """groups of the group normalization; must divide every entry of `channels`"""
    attention: bool = True
    """self-attention at the lowest resolution (Stable Diffusion: yes)"""

    def __post_init__(self) -> None:
        for width in self.channels:
            if width % self.norm_groups:
                raise ValueError(
                    f"autoencoder.channels: {width} is not a multiple of autoencoder.norm_groups ({self.norm_groups})"
                )

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class DenoiserConfig:
    """Keys that all denoisers have."""

    loop: LoopConfig
    """denoiser training (paper: adamw, learning rate 1e-4, 1000 epochs)"""
    name: str
    """architecture; `mgcc list denoisers` describes them"""
    diffusion_steps: PositiveInt = 1000
    """T, number of diffusion steps (paper: 1000)"""
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    """noise schedule, by its name in diffusers (paper: not stated; Rombach et al. and medfusion: scaled_linear)"""
    beta_start: PositiveFloat = 0.00085
    """noise variance of the first step (paper: not stated; Stable Diffusion: 0.00085; medfusion: 0.002)"""
    beta_end: PositiveFloat = 0.012
    """noise variance of the last step (paper: not stated; Stable Diffusion: 0.012; medfusion: 0.02, which leaves so
    little signal at t = T that a small error in the predicted noise changes the brightness of the entire image)"""
    objective: Objective = "epsilon"
    """what the denoiser predicts: the noise (paper, Eq. 2); v_prediction, which `zero_terminal_snr` needs; or the
    velocity of a rectified flow, which uses no noise schedule and needs `sampling.sampler` euler or dpm_solver++"""
    zero_terminal_snr: bool = False
    """rescale the schedule so that t = T is pure noise, where sampling starts (Lin et al. 2024); for v_prediction"""
    min_snr_gamma: PositiveFloat | None = None
    """limit of the signal-to-noise ratio that weights the errors (Hang et al. 2023: 5); null weights all errors of the
    prediction equally (paper)"""
    batch: PositiveInt = 4
    """images per rank and micro-step (paper: 4)"""
    classes: bool = False
    """condition on the class of the training images; see `sampling.guidance` (paper: no)"""
    masks: Masks = "none"
    """condition on the lesion mask, so that samples are pairs of image and mask for `data.synthetic_labeled` of
    `mgcc segment`. labeled: the masks of the split's labeled images; all: those of all training images that have one.
    Other images are trained on without a mask (paper: none)"""
    label_dropout: UnitInterval = 0.1
    """with `classes` or `masks`: share of images that are trained on without class and mask, for guidance (Ho &
    Salimans: 0.1 to 0.2)"""
    init: FileOrFolder | None = data_input(None)
    """start from another denoiser's weights: OUT/denoiser of another run, or a model.safetensors. It should have been
    trained on latents of a similar autoencoder, such as the one that `autoencoder.init` names"""

    @property
    def size_divisor(self) -> int:
        """The sides of latents must be multiples of this."""
        return 1

    @property
    def mask_channels(self) -> int:
        """Channels that a lesion mask adds to the denoiser's input."""
        return 0 if self.masks == "none" else 1


@dataclass(frozen=True)
class UNetDenoiserConfig(DenoiserConfig):
    """diffusers' UNet2DModel, as in latent diffusion."""

    name: Literal["unet"] = "unet"
    channels: tuple[PositiveInt, ...] = (224, 448, 672, 896)
    """channels per level; each level after the first halves the latent size (paper: not stated; Rombach et al. 2022,
    unconditional, on 64x64 latents: 224, 448, 672, 896)"""
    attention: tuple[bool, ...] = (False, True, True, True)
    """whether each level has self-attention (Rombach et al.: at latent sizes 32, 16 and 8)"""
    layers: PositiveInt = 2
    """residual blocks per level (Rombach et al.: 2)"""
    norm_groups: PositiveInt = 32
    """groups of the group normalization; must divide every entry of `channels`"""
    head_channels: PositiveInt = 32
    """channels per attention head (Rombach et al.: 32); must divide every entry of `channels`"""

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.channels):
            raise ValueError(
                f"denoiser.attention: has {len(self.attention)} levels but denoiser.channels has {len(self.channels)}"
            )
        for width in self.channels:
            for key in ("norm_groups", "head_channels"):
                if width % getattr(self, key):
                    raise ValueError(f"denoiser.channels: {width} is not a multiple of denoiser.{key}")

    @property
    def size_divisor(self) -> int:
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class DiTDenoiserConfig(DenoiserConfig):
    """diffusers' DiTTransformer2DModel, a diffusion transformer (Peebles & Xie 2023)."""

    name: Literal["dit"] = "dit"
    patch: PositiveInt = 2
    """side of the patches of latents that become tokens; halving it makes four times as many (DiT: 2, 4 or 8)"""
    layers: PositiveInt = 12
    """transformer blocks (DiT-S and DiT-B: 12, DiT-L: 24, DiT-XL: 28)"""
    heads: PositiveInt = 12
    """attention heads (DiT-S: 6, DiT-B: 12, DiT-L and DiT-XL: 16)"""
    head_channels: PositiveInt = 64
    """channels per attention head (DiT: 64, DiT-XL: 72); times `heads`, it must be a multiple of 4"""

    def __post_init__(self) -> None:
        if self.heads * self.head_channels % 4:
            raise ValueError(
                f"denoiser.head_channels: {self.head_channels} times denoiser.heads ({self.heads}) must be a multiple "
                "of 4"
            )

    @property
    def size_divisor(self) -> int:
        return self.patch


AUTOENCODERS = Registry("autoencoder", AutoencoderConfig, default="kl")
AUTOENCODERS.register(KLAutoencoderConfig, "mgcc_dist.diffusion.autoencoder:build_kl")
DENOISERS = Registry("denoiser", DenoiserConfig, default="unet")
DENOISERS.register(UNetDenoiserConfig, "mgcc_dist.diffusion.denoiser_unet:build")
DENOISERS.register(DiTDenoiserConfig, "mgcc_dist.diffusion.denoiser_dit:build")


@dataclass(frozen=True)
class SamplingConfig:
    count: PositiveInt = 725
    """number of synthetic images (paper: 725 for BUSI, selected by professionals)"""
    sampler: Solver = "ddim"
    """ODE solver (paper: ddim); dpm_solver++ needs a quarter of the steps; euler is for `denoiser.objective` flow, for
    which ddim is not defined"""
    steps: PositiveInt = 100
    """denoiser evaluations per image (paper: 100, with ddim); 20 to 25 for dpm_solver++"""
    guidance: NonNegativeFloat = 1.0
    """with `denoiser.classes` or `denoiser.masks`: scale of classifier-free guidance; 1 samples the learned
    distributions, 0 ignores class and mask, 3 makes lesions fit their masks better; values other than 0 and 1 double
    the sampling time"""
    seed: NonNegativeInt = 0
    """seed of the initial noise"""
    name: Name = ""
    """write samples, quality, audit and gallery to OUT/NAME/ instead of OUT/, to keep sets of several seeds or samplers
    from one model. A higher `count` needs no name: it extends the samples"""
    per_shard: PositiveInt = 64
    """images per shard; each shard is generated by one rank, so use several shards per rank. An existing folder keeps
    its own"""
    batch: PositiveInt = neutral(16)
    """images per batch; affects speed and memory, and the images only by rounding"""
    precision: Literal["no", "bf16"] | None = None
    """bf16 samples with bfloat16 weights; null uses bf16 if the training did"""
    compile: bool = neutral(False)
    """torch.compile both networks (with CUDA graphs on a GPU); compiling takes about a minute and pays off from a few
    hundred images on"""

    def __post_init__(self) -> None:
        check_set_name(self.name)


def check_objective(denoiser: DenoiserConfig, solver: Solver) -> None:
    """Raise ValueError if the options of the objective, or the sampler, do not belong together."""
    flow = denoiser.objective == "flow"
    if denoiser.zero_terminal_snr and denoiser.objective != "v_prediction":
        reason = (
            "has no effect on a flow, which ends in pure noise anyway. Set it to false."
            if flow
            else "can't be combined with objective epsilon: in pure noise, the noise tells nothing about the image. "
            "Set denoiser.objective v_prediction."
        )
        raise ValueError(f"denoiser.zero_terminal_snr: {reason}")
    if denoiser.min_snr_gamma is not None and (flow or denoiser.zero_terminal_snr):
        reason = "is not defined for a flow" if flow else "gives pure noise, where zero_terminal_snr ends, the weight 0"
        raise ValueError(f"denoiser.min_snr_gamma: {reason}. Set it to null.")
    if not flow and not denoiser.beta_start <= denoiser.beta_end < 1:
        raise ValueError(
            f"denoiser.beta_end: expected at least denoiser.beta_start ({denoiser.beta_start:g}) and below 1, got "
            f"{denoiser.beta_end:g}"
        )
    if problem := solver_problem(solver, flow):
        raise ValueError(f"sampling.sampler: {problem}")


def solver_problem(solver: Solver, flow: bool) -> str:
    """Return why `solver` can't sample a flow, or anything else; "" if it can."""
    if flow and solver == "ddim":
        return "ddim can't sample a flow. Choose euler or dpm_solver++."
    if solver == "euler" and not flow:
        return "euler only samples denoisers with objective flow. Choose ddim or dpm_solver++."
    return ""


def check_set_name(name: str) -> None:
    """Raise ValueError unless a folder of samples may be called OUT/NAME."""
    if name in STAGES or name.startswith(".") or set(name) & {"/", "\\"}:
        raise ValueError(
            f"sampling.name: {name!r} can't be used. Give a plain folder name other than {', '.join(STAGES)}."
        )
