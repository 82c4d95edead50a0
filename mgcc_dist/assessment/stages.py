"""What the stages of `mgcc ldm` run that evaluate the samples: audit, quality, gallery, curation."""

import logging
from pathlib import Path

from accelerate import Accelerator

from mgcc_dist.assessment import audit, curate, features, filter, gallery, quality
from mgcc_dist.assessment.config import AuditConfig, CurateConfig, FilterConfig, QualityConfig
from mgcc_dist.assessment.features import FeatureExtractor
from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.files import read_object
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.selection import drop_records
from mgcc_dist.diffusion.autoencoder import load_pretrained
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.diffusion.pipeline import vae_folder

logger = logging.getLogger(__name__)


def check_settings(
    of_quality: QualityConfig, of_audit: AuditConfig, of_filter: FilterConfig, images: ImageData, samples: int
) -> None:
    """Check the settings of quality, audit and filter before training.

    Raises:
        UserError: there are too few images, or the encoder or the run of the filter can't be used.
    """
    quality.check_config(of_quality, images, samples)
    audit.check_config(of_audit, images)
    filter.check_config(of_filter, images)


def evaluate_quality(
    config: QualityConfig,
    extractor: FeatureExtractor,
    images: ImageData,
    samples: Path,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    """Compare the samples with the validation images and write the report to `folder`."""
    report = quality.evaluate(config, extractor, images, samples, folder, accelerator)
    accelerator.print(quality.markdown_report(report), end="")
    logger.info("quality: report -> %s", folder / "quality.json")


def audit_samples(
    config: AuditConfig,
    extractor: FeatureExtractor | None,
    images: ImageData,
    samples: Path,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    """Search the samples for copies of training images and write the report to `folder`."""
    report = audit.audit(config, extractor, images, samples, folder, accelerator)
    if not extractor:
        logger.info("audit: comparing pixels only (quality.encoder names no trained network)")
    action = "to be dropped" if config.drop_copies else "listed; pass --audit.drop_copies true to remove them"
    logger.info(
        "audit: %d of %d samples are near-copies of training images (%s), %s -> %s",
        *(len(report["near_copies"]), report["synthetic"]["images"], audit.describe_thresholds(report), action, folder),
    )


def drop_copies(samples: Path, audit_file: Path, accelerator: Accelerator) -> None:
    """Remove the near-copies that the audit found from the shards of the samples."""
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            drop_records(samples, read_object(audit_file)["near_copies"])


def save_gallery(images: ImageData, vae: Path, samples: Path, path: Path, accelerator: Accelerator) -> None:
    """Draw real, reconstructed and synthetic images."""
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            gallery.save_gallery(images.val_examples(8), load_pretrained(vae), ShardFolder.open(samples), path)
            logger.info("gallery: picture -> %s", path)


def curate_samples(config: CurateConfig, encoder: str | None, images: ImageData) -> None:
    """Write a proposal, and the page on which a person edits it, to `curation/`."""
    extractor = features.load(encoder, vae_folder(Path(config.out) / "pipeline"), images.size)
    out = Path(config.out) / config.name
    proposal = curate.curate(config, extractor, images, out / "samples", out / "audit" / "audit.json", out / "curation")
    apply = f"apply --selection selection.json --samples {out / 'samples'} --out {out / 'curated'}"
    print(
        f"curate: {len(proposal['proposed'])} of {len(proposal['images'])} samples proposed. "
        f"Open {out / 'curation' / 'page.html'} in a browser, save selection.json there, then run\n"
        f"    mgcc ldm {apply}"
    )
