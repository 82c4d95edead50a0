"""Train a latent diffusion model on ultrasound images, sample synthetic images and evaluate them.

    mgcc ldm                                                                # demo: phantom images, minutes on a CPU
    mgcc ldm --preset busi --data.shards out/busi --out out/ldm             # the paper's settings, one process
    accelerate launch -m mgcc_dist.ldm --preset busi --data.shards out/busi --out out/ldm        # several processes
    mgcc ldm curate --out out/ldm                                           # write a page for selecting samples
    mgcc ldm apply --selection selection.json --samples out/ldm/samples --out out/ldm/curated

The program runs eight stages and skips those whose result already exists in OUT: `autoencoder/` (a run folder),
`latents/` (the encoded images), `denoiser/` (a run folder), `pipeline/` (loads in diffusers), `samples/` (a shard
folder, for `mgcc segment --data.synthetic`), `quality/` (metrics against the validation images), `audit/`
(near-copies of training images) and `gallery.png`. Rerun the same command to resume.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mgcc_dist.assessment.config import ApplyConfig, AuditConfig, CurateConfig, QualityConfig
from mgcc_dist.common.config import CONFIGS, load, save
from mgcc_dist.common.errors import run_program
from mgcc_dist.common.options import neutral
from mgcc_dist.common.program import Command, Program
from mgcc_dist.common.value_types import Folder
from mgcc_dist.diffusion.config import AutoencoderConfig, DataConfig, DenoiserConfig, SamplingConfig, check_objective

logger = logging.getLogger("mgcc_dist.ldm")


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
                "of their `channels` halves it, except the first. Choose another size or fewer levels."
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


def run(config: LdmConfig) -> None:
    """Run all stages, skipping those whose result already exists."""
    from mgcc_dist.assessment import audit, quality
    from mgcc_dist.assessment import stages as assessment
    from mgcc_dist.common.distributed import create_accelerator, describe, raise_on_all_ranks
    from mgcc_dist.common.lock import lock_folder
    from mgcc_dist.diffusion import sampling
    from mgcc_dist.diffusion import stages as diffusion

    out = Path(config.out)
    accelerator = create_accelerator(config.autoencoder.loop.precision)
    lock_folder(out, accelerator)
    logger.info("ldm: %s", describe(accelerator))
    with raise_on_all_ranks():
        sampling.check_folder(config.sampling, out / config.sampling.name / "samples")
        diffusion.check_stages(config.data, config.autoencoder, config.denoiser, out)
    if accelerator.is_main_process:
        save(config, out / "config.yaml")

    images = diffusion.open_images(config.data, out, accelerator)
    if config.until == "gallery":
        quality.check_config(config.quality, images, config.sampling.count)
        audit.check_config(config.audit, images)
    diffusion.train_autoencoder(config.autoencoder, config.data, images, out)
    if config.until == "autoencoder":
        return
    encoded = diffusion.encode_images(config.autoencoder, images, out, accelerator)
    diffusion.train_denoiser(config.denoiser, config.data, images, encoded, out)
    if config.until == "denoiser":
        return
    diffusion.save_pipeline(config.denoiser, encoded, out, accelerator)
    diffusion.generate_samples(config.sampling, out, accelerator)
    if config.until == "samples":
        return
    name = config.sampling.name
    assessment.evaluate_quality(config.quality, images, out, name, accelerator)
    assessment.audit_samples(config.audit, config.quality.encoder, images, out, name, accelerator)
    assessment.save_gallery(images, out, name, accelerator)


def curate_samples(config: CurateConfig) -> None:
    """Write a proposal, and the page on which a person edits it, to OUT/curation."""
    from mgcc_dist.assessment.stages import curate_samples
    from mgcc_dist.common.distributed import create_accelerator
    from mgcc_dist.diffusion.stages import open_images

    out = Path(config.out)
    trained = load(LdmConfig, out / "config.yaml")
    curate_samples(config, trained.quality.encoder, open_images(trained.data, out, create_accelerator()))


def apply_selection(config: ApplyConfig) -> None:
    """Write the accepted samples of a selection to a new shard folder."""
    from mgcc_dist.data import selection

    kept = selection.apply_selection(Path(config.selection), Path(config.samples), Path(config.out))
    logger.info("apply: %d selected images -> %s", kept, config.out)


PROGRAM = Program(
    "ldm",
    __doc__,
    default=Command(
        LdmConfig,
        run,
        "train a latent diffusion model and sample synthetic images",
        __doc__,
        presets=CONFIGS / "ldm",
        default_preset="demo",
        several_processes=True,
        config_files=True,
        common=(
            *("out", "until", "data.shards", "data.split", "data.image_size", "autoencoder.batch"),
            *("autoencoder.loop.epochs", "autoencoder.loop.steps", "denoiser.batch"),
            *("denoiser.classes", "denoiser.loop.epochs", "denoiser.loop.steps", "denoiser.objective"),
            *("sampling.count", "sampling.sampler", "sampling.steps"),
            *("quality.encoder", "audit.drop_copies"),
        ),
    ),
    commands={
        "curate": Command(
            CurateConfig, curate_samples, "propose samples and write a page for selecting them", config_files=True
        ),
        "apply": Command(
            ApplyConfig, apply_selection, "write the selected samples to a new shard folder", config_files=True
        ),
    },
)
main = PROGRAM.main

if __name__ == "__main__":
    run_program("ldm", main)
