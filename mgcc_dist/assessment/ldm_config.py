"""Config of `mgcc ldm`: all stages of one output folder."""

from dataclasses import dataclass, field
from typing import Literal

from mgcc_dist.assessment.config import AuditConfig, FilterConfig, QualityConfig
from mgcc_dist.common.options import neutral
from mgcc_dist.common.value_types import Folder
from mgcc_dist.diffusion.config import AutoencoderConfig, DataConfig, DenoiserConfig, SamplingConfig, check_objective


@dataclass(frozen=True)
class LdmConfig:
    data: DataConfig
    autoencoder: AutoencoderConfig
    denoiser: DenoiserConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    out: Folder = neutral("out/ldm")
    """output folder"""
    until: Literal["autoencoder", "denoiser", "samples", "gallery"] = neutral("gallery")
    """last stage to run, for clusters that run the stages as separate jobs; `gallery` includes all the others"""

    def __post_init__(self) -> None:
        if self.autoencoder.loop.precision != self.denoiser.loop.precision:
            raise ValueError("autoencoder.loop.precision and denoiser.loop.precision must be equal")
        multiple = self.autoencoder.downsampling * self.denoiser.size_divisor
        if self.data.image_size % multiple:
            raise ValueError(
                f"data.image_size: {self.data.image_size} is not a multiple of {multiple}. The autoencoder divides the "
                f"size by {self.autoencoder.downsampling} and the denoiser by {self.denoiser.size_divisor}: each level "
                "of `channels` halves it, except the first; `patch` divides it. Choose another size or fewer levels."
            )
        adversarial = self.autoencoder.losses.adversarial
        if adversarial.weight and self.data.image_size < adversarial.least_size:
            raise ValueError(
                f"autoencoder.losses.adversarial.layers: {adversarial.layers} need images of at least "
                f"{adversarial.least_size} pixels per side, but data.image_size is {self.data.image_size}. Use fewer."
            )
        check_objective(self.denoiser, self.sampling.sampler)
        if self.sampling.steps > self.denoiser.diffusion_steps:
            raise ValueError(
                f"sampling.steps: {self.sampling.steps} is more than denoiser.diffusion_steps "
                f"({self.denoiser.diffusion_steps}). Choose at most as many."
            )
        if self.sampling.guidance != 1 and not self.denoiser.classes and self.denoiser.masks == "none":
            raise ValueError(
                f"sampling.guidance: {self.sampling.guidance:g} needs a denoiser with classes or masks. "
                "Set denoiser.classes true or denoiser.masks, or leave sampling.guidance at 1."
            )
        if self.filter.run and self.denoiser.masks == "none":
            raise ValueError(
                "filter.run: samples have no masks to filter by. Set denoiser.masks labeled, or filter.run null."
            )
