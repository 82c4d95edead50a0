"""The stages of `mgcc ldm` that evaluate the samples: quality, audit, gallery, curation.

They work on OUT/NAME/samples, with an empty name by default (`sampling.name`). A stage is skipped if its result already
exists.
"""

import logging
from pathlib import Path

from accelerate import Accelerator

from mgcc_dist.assessment import audit, curate, features, gallery, quality
from mgcc_dist.assessment.config import AuditConfig, CurateConfig, QualityConfig
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.diffusion.autoencoder import load_pretrained
from mgcc_dist.diffusion.images import ImageData

logger = logging.getLogger(__name__)


def evaluate_quality(config: QualityConfig, images: ImageData, out: Path, name: str, accelerator: Accelerator) -> None:
    """Compare the samples with the validation images and write the report to `quality/`."""
    folder, samples = out / name / "quality", out / name / "samples"
    if not config.enabled:
        logger.info("quality: skipped (quality.enabled is false)")
        return
    extractor = features.load(config.encoder, out / "pipeline" / "vqvae", images.size)
    if quality.is_finished(config, extractor, images, samples, folder):
        logger.info("quality: %s already exists", folder / "quality.json")
        return
    report = quality.evaluate(config, extractor, images, samples, folder, accelerator)
    accelerator.print(quality.markdown_report(report), end="")
    logger.info("quality: report -> %s", folder / "quality.json")


def audit_samples(
    config: AuditConfig, encoder: str | None, images: ImageData, out: Path, name: str, accelerator: Accelerator
) -> None:
    """Search the samples for copies of training images, write the report to `audit/`, and drop copies on request."""
    folder, samples = out / name / "audit", out / name / "samples"
    if not config.enabled:
        logger.info("audit: skipped (audit.enabled is false)")
        return
    extractor = features.load(encoder, out / "pipeline" / "vqvae", images.size) if encoder else None
    if audit.is_finished(config, extractor, images, samples, folder):
        logger.info("audit: %s already exists", folder / "audit.json")
        return
    report = audit.audit(config, extractor, images, samples, folder, accelerator)
    if not extractor:
        logger.info("audit: comparing pixels only (quality.encoder names no trained network)")
    action = "dropped" if config.drop_copies else "listed; pass --audit.drop_copies true to remove them"
    logger.info(
        "audit: %d of %d samples are near-copies of training images (%s), %s -> %s",
        *(len(report["near_copies"]), report["synthetic"]["images"], audit.describe_thresholds(report), action, folder),
    )


def save_gallery(images: ImageData, out: Path, name: str, accelerator: Accelerator) -> None:
    """Draw `gallery.png`, and redraw it if the samples are newer."""
    path, samples = out / name / "gallery.png", out / name / "samples"
    if path.is_file() and path.stat().st_mtime >= (samples / "index.json").stat().st_mtime:
        logger.info("gallery: %s already exists", path)
    elif accelerator.is_main_process:
        vae = load_pretrained(out / "pipeline" / "vqvae")
        gallery.save_gallery(images.val_examples(8), vae, ShardFolder.open(samples), path)
        logger.info("gallery: picture -> %s", path)
    accelerator.wait_for_everyone()


def curate_samples(config: CurateConfig, encoder: str | None, images: ImageData) -> None:
    """Write a proposal, and the page on which a person edits it, to `curation/`."""
    extractor = features.load(encoder, Path(config.out) / "pipeline" / "vqvae", images.size)
    out = Path(config.out) / config.name
    proposal = curate.curate(config, extractor, images, out / "samples", out / "audit" / "audit.json", out / "curation")
    apply = f"apply --selection selection.json --samples {out / 'samples'} --out {out / 'curated'}"
    print(
        f"curate: {len(proposal['proposed'])} of {len(proposal['images'])} samples proposed. "
        f"Open {out / 'curation' / 'page.html'} in a browser, save selection.json there, then run\n"
        f"    mgcc ldm {apply}"
    )
