"""Config of `mgcc ldm`: all stages of one output folder."""

from dataclasses import dataclass, field
from typing import Literal

from mgcc_dist.assessment.config import AuditConfig, QualityConfig
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
    out: Folder = neutral("out/ldm")
    """output folder"""
    until: Literal["autoencoder", "denoiser", "samples", "gallery"] = neutral("gallery")
    """last stage to run, for clusters that run the stages as separate jobs; `gallery` includes quality and audit"""

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
        check_objective(self.denoiser, self.sampling.sampler)
        if self.sampling.steps > self.denoiser.diffusion_steps:
            raise ValueError(
                f"sampling.steps: {self.sampling.steps} is more than denoiser.diffusion_steps "
                f"({self.denoiser.diffusion_steps}). Choose at most as many."
            )
        if self.sampling.guidance != 1 and not self.denoiser.classes:
            raise ValueError(
                f"sampling.guidance: {self.sampling.guidance:g} needs a denoiser with classes. "
                "Set denoiser.classes true, or leave sampling.guidance at 1."
            )
