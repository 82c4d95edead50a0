"""The stages of `mgcc_dist.ldm` that judge its samples: quality, audit, gallery, curation."""

from pathlib import Path

from accelerate import Accelerator
from diffusers import AutoencoderKL

from mgcc_dist.assessment import audit, curate, features, gallery, quality
from mgcc_dist.assessment.config import AuditConfig, CurateConfig, QualityConfig
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.diffusion.images import Images


def measure_quality(config: QualityConfig, images: Images, out: Path, accelerator: Accelerator) -> None:
    """Leave `quality/`, which compares the samples with the held-out images."""
    folder = out / "quality"
    if not config.enabled:
        accelerator.print("quality: not measured, since quality.enabled is false")
        return
    used = features.load(config.encoder, out / "pipeline" / "vqvae", images.size)
    if quality.is_finished(config, used, images, out / "samples", folder):
        accelerator.print(f"quality: {folder / 'quality.json'} is there already")
        return
    report = quality.measure(config, used, images, out / "samples", folder, accelerator)
    accelerator.print(f"{quality.table(report)}quality: -> {folder / 'quality.json'}")


def audit_samples(
    config: AuditConfig, encoder: str | None, images: Images, out: Path, accelerator: Accelerator
) -> None:
    """Leave `audit/`, which says what samples are copies of training images, and drop those if that is asked for."""
    folder = out / "audit"
    if not config.enabled:
        accelerator.print("audit: not made, since audit.enabled is false")
        return
    used = features.load(encoder, out / "pipeline" / "vqvae", images.size) if encoder else None
    if audit.is_finished(config, used, images, out / "samples", folder):
        accelerator.print(f"audit: {folder / 'audit.json'} is there already")
        return
    report = audit.audit(config, used, images, out / "samples", folder, accelerator)
    over = f"similarity over {report['threshold']:.2f}"
    if used:
        over += f" in pixels or {report['features']['threshold']:.2f} in features"
    else:
        accelerator.print("audit: images are compared in pixels alone, since quality.encoder names no trained network")
    what = "dropped" if config.drop_copies else "listed; --audit.drop_copies true takes them out"
    accelerator.print(
        f"audit: {len(report['near_copies'])} of {report['synthetic']['images']} samples are as good as copies "
        f"of a training image ({over}), {what} -> {folder}"
    )


def draw_gallery(images: Images, out: Path, accelerator: Accelerator) -> None:
    """Draw `gallery.png` after the samples that it shows."""
    path, samples = out / "gallery.png", out / "samples"
    if path.is_file() and path.stat().st_mtime >= (samples / "index.json").stat().st_mtime:
        accelerator.print(f"gallery: {path} is there already")
    elif accelerator.is_main_process:
        vae = AutoencoderKL.from_pretrained(out / "pipeline" / "vqvae")
        gallery.draw(images.examples(8), vae, ShardFolder.open(samples), path)
        print(f"gallery: {path}")
    accelerator.wait_for_everyone()


def curate_samples(config: CurateConfig, encoder: str | None, images: Images) -> None:
    """Leave `curation/`: a proposal, and the page on which a person makes a selection of it."""
    out = Path(config.out)
    used = features.load(encoder, out / "pipeline" / "vqvae", images.size)
    proposal = curate.curate(config, used, images, out / "samples", out / "audit" / "audit.json", out / "curation")
    apply = f"apply --selection selection.json --samples {out / 'samples'} --out {out / 'curated'}"
    print(
        f"curate: {len(proposal['proposed'])} of {len(proposal['images'])} samples proposed; "
        f"open {out / 'curation' / 'page.html'} in a browser, save selection.json there, then\n"
        f"    python -m mgcc_dist.ldm {apply}"
    )
