"""Train a latent diffusion model on ultrasound images, sample synthetic images and evaluate them.

    mgcc ldm                                                                # demo: phantom images, minutes on a CPU
    mgcc ldm --preset busi --data.shards out/busi --out out/ldm             # the paper's settings, one process
    accelerate launch -m mgcc_dist.ldm --preset busi --data.shards out/busi --out out/ldm        # several processes
    mgcc ldm curate --out out/ldm                                           # write a page for selecting samples
    mgcc ldm apply --selection selection.json --samples out/ldm/samples --out out/ldm/curated

The program runs these stages, and skips those that are done, i.e. have the same inputs and outputs as in OUT/stages:
`autoencoder/` (a run folder), `latents/` (the encoded images), `denoiser/` (a run folder), `pipeline/` (loads in
diffusers), `samples/` (a shard folder, for `mgcc segment --data.synthetic`), `audit/` (near-copies of training
images), `quality/` (metrics against the validation images) and `gallery.png`. Rerun the same command to resume.

With `--denoiser.masks labeled` the samples are pairs of image and mask, for `mgcc segment --data.synthetic_labeled`.
`--filter.run` drops those on which a segmentation run disagrees with the mask; the others are in `pairs/`.
"""

import logging
from functools import cache
from pathlib import Path

from mgcc_dist.assessment.config import ApplyConfig, CurateConfig
from mgcc_dist.assessment.ldm_config import LdmConfig
from mgcc_dist.common.config import CONFIGS, load, save
from mgcc_dist.common.errors import run_program
from mgcc_dist.common.program import Command, Program

logger = logging.getLogger("mgcc_dist.ldm")


def run(config: LdmConfig) -> None:
    """Run the stages up to `until`, skipping those that are done."""
    from mgcc_dist.assessment.ldm_stages import list_stages
    from mgcc_dist.assessment.stages import check_settings
    from mgcc_dist.common.distributed import create_accelerator, describe, raise_on_all_ranks
    from mgcc_dist.common.lock import lock_folder
    from mgcc_dist.common.stages import all_done, run_stages
    from mgcc_dist.diffusion.stages import check_masks, check_stages, open_images

    out = Path(config.out)
    accelerator = create_accelerator(config.autoencoder.loop.precision)
    logger.info("ldm: %s", describe(accelerator))
    images = cache(lambda: open_images(config.data, out, accelerator))
    stages = list_stages(config, images, accelerator)
    if not all_done(stages, accelerator):  # a finished folder may be read-only
        lock_folder(out, accelerator)
        with raise_on_all_ranks():
            if accelerator.is_main_process:
                check_stages(config.data, config.autoencoder, config.denoiser, config.sampling, out)
                save(config, out / "config.yaml")
        opened = images()  # collective
        with raise_on_all_ranks():
            if accelerator.is_main_process:
                check_masks(config.denoiser.masks, opened, out)
        if config.until == "gallery":
            check_settings(config.quality, config.audit, config.filter, opened, config.sampling.count)
    run_stages(stages, accelerator)


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
            *(
                "denoiser.classes",
                "denoiser.masks",
                "denoiser.loop.epochs",
                "denoiser.loop.steps",
                "denoiser.objective",
            ),
            *("sampling.count", "sampling.sampler", "sampling.steps"),
            *("quality.encoder", "audit.drop_copies", "filter.run"),
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
