"""The generative program: learn a set of ultrasound images, then make new ones of the same kind.

    accelerate launch -m mgcc_dist.ldm                                          # demo: phantom images, minutes on a CPU
    accelerate launch -m mgcc_dist.ldm --preset busi --data.shards out/busi     # the paper's settings
    python -m mgcc_dist.ldm curate --out out/ldm                                # a page on which to choose samples
    python -m mgcc_dist.ldm apply --selection selection.json --samples out/ldm/samples --out out/ldm/curated

It runs what is missing in OUT of eight stages: `autoencoder/` (a run folder), `latents/` (the images, encoded once),
`denoiser/` (a run folder), `pipeline/` (for plain diffusers), `samples/` (a shard folder, which `mgcc_dist.segment`
reads by `--data.synthetic`), `quality/` (how like the held-out images they are), `audit/` (which samples are copies of
training images) and `gallery.png`. The same command again goes on where it was stopped.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mgcc_dist.assessment.config import ApplyConfig, AuditConfig, CurateConfig, QualityConfig
from mgcc_dist.common.config import CONFIGS, load, parse, save
from mgcc_dist.common.errors import run_program
from mgcc_dist.diffusion.config import AutoencoderConfig, DataConfig, DenoiserConfig, SamplingConfig


@dataclass(frozen=True)
class LdmConfig:
    data: DataConfig
    autoencoder: AutoencoderConfig
    denoiser: DenoiserConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    out: str = "out/ldm"
    """folder of everything that is made"""
    until: Literal["autoencoder", "denoiser", "samples", "gallery"] = "gallery"
    """stop after this stage; a cluster runs them as jobs of their own (quality, audit and gallery go together)"""

    def __post_init__(self) -> None:
        if self.autoencoder.loop.precision != self.denoiser.loop.precision:
            raise ValueError("autoencoder.loop.precision and denoiser.loop.precision must be the same")


def main() -> None:
    command, words = sys.argv[1:2], sys.argv[2:]
    if command == ["curate"]:
        curate_samples(parse(CurateConfig, "ldm curate", "Propose samples and write a page to choose on.", argv=words))
    elif command == ["apply"]:
        apply_selection(parse(ApplyConfig, "ldm apply", "Write the samples that a person chose.", argv=words))
    else:
        text = "Learn a set of images and make new ones of its kind. `ldm curate` and `ldm apply` choose among these."
        run(parse(LdmConfig, "ldm", text, CONFIGS / "ldm", "demo"))


def run(config: LdmConfig) -> None:
    """All stages, each of which returns at once where its result is there already."""
    from mgcc_dist.assessment import quality
    from mgcc_dist.assessment import stages as judge
    from mgcc_dist.common.distributed import describe, start
    from mgcc_dist.diffusion import stages

    out = Path(config.out)
    accelerator = start(config.autoencoder.loop.precision)
    accelerator.print(f"ldm: {describe(accelerator)}")
    if accelerator.is_main_process:
        save(config, out / "config.yaml")

    images = stages.open_images(config.data, out, accelerator)
    if config.until == "gallery":
        quality.check(config.quality, images, config.sampling.count)
    stages.train_autoencoder(config.autoencoder, config.data, images, out)
    if config.until == "autoencoder":
        return
    encoded = stages.encode_images(config.autoencoder, images, out, accelerator)
    stages.train_denoiser(config.denoiser, config.data, images, encoded, out)
    if config.until == "denoiser":
        return
    stages.save_pipeline(config.denoiser, encoded, out, accelerator)
    stages.draw_samples(config.sampling, out, accelerator)
    if config.until == "samples":
        return
    judge.measure_quality(config.quality, images, out, accelerator)
    judge.audit_samples(config.audit, config.quality.encoder, images, out, accelerator)
    judge.draw_gallery(images, out, accelerator)


def curate_samples(config: CurateConfig) -> None:
    """Leave `curation/`: a proposal, and the page on which a person makes a selection of it."""
    from mgcc_dist.assessment.stages import curate_samples
    from mgcc_dist.common.distributed import start
    from mgcc_dist.diffusion.stages import open_images

    out = Path(config.out)
    made = load(LdmConfig, out / "config.yaml")
    curate_samples(config, made.quality.encoder, open_images(made.data, out, start()))


def apply_selection(config: ApplyConfig) -> None:
    from mgcc_dist.data import selection

    kept = selection.apply(Path(config.selection), Path(config.samples), Path(config.out))
    print(f"apply: {kept} synthetic images -> {config.out}")


if __name__ == "__main__":
    run_program("ldm", main)
