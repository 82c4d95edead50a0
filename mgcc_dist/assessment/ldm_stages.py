"""The stages of `mgcc ldm`, in order. To add one, write what it runs in stages.py and an entry here."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from accelerate import Accelerator

from mgcc_dist.assessment import audit, features
from mgcc_dist.assessment import stages as assessment
from mgcc_dist.assessment.filter import filter_pairs
from mgcc_dist.assessment.ldm_config import LdmConfig
from mgcc_dist.common.stages import Stage
from mgcc_dist.data.records import index_file
from mgcc_dist.data.remote import hash_file
from mgcc_dist.diffusion import pipeline, sampling
from mgcc_dist.diffusion import stages as diffusion
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.evaluation.sample_metrics import METRICS
from mgcc_dist.inference.encoders import load_feature_maps, locate_encoder
from mgcc_dist.train.initial_weights import find_weights


def list_stages(config: LdmConfig, images: Callable[[], ImageData], accelerator: Accelerator) -> list[Stage]:
    """Return the stages up to `until`, in order. `images` opens the images on first use."""
    out, data, encoder = Path(config.out), config.data, config.quality.encoder
    own = out / config.sampling.name  # folder of this set of samples
    samples, audit_file = own / "samples", own / "audit" / "audit.json"
    vae, unet, files = out / diffusion.VAE, out / diffusion.UNET, pipeline.files(config.denoiser)
    shards, split = diffusion.locate_images(data, out)
    index = index_file(shards)
    content = index if isinstance(index, Path) else hash_file(index)  # not a URL: the data may move, and change there
    real = {"data": replace(data, shards=None, split=None), "shards": content, "split": split}
    encoder_file = locate_encoder(features.OPTION, encoder) if encoder else None
    masks = config.denoiser.masks
    conditioned = {**real, "masks": masks} if masks != "none" else {}
    run = config.filter.run
    latents = cache(lambda: diffusion.encode_images(config.autoencoder, images(), out, accelerator, masks))
    extractor = cache(lambda: features.load(encoder, vae.parent, data.image_size))

    stages = [
        Stage(
            "autoencoder",
            out,
            {**real, "autoencoder": config.autoencoder},
            ("autoencoder/result.json", diffusion.VAE),
            lambda: diffusion.train_autoencoder(
                config.autoencoder, data, images(), out, accelerator, load_feature_maps
            ),
        ),
        Stage("latents", out, {**real, "vae": vae, **conditioned}, ("latents/train", "latents/val"), latents),
        Stage(
            "denoiser",
            out,
            {**real, "vae": vae, "denoiser": config.denoiser},
            ("denoiser/result.json", diffusion.UNET),
            lambda: diffusion.train_denoiser(config.denoiser, data, images(), latents(), out, accelerator),
        ),
        Stage(
            "pipeline",
            out,
            {"vae": vae, "unet": unet},
            [f"pipeline/{name}" for name in files],
            lambda: diffusion.save_pipeline(config.denoiser, latents(), out, accelerator),
        ),
        sampled := Stage(
            "samples",
            own,
            {
                "pipeline": [out / "pipeline" / name for name in files],
                "sampling": config.sampling,
                "precision": sampling.precision(config.sampling, accelerator),
                **conditioned,
            },
            ("samples",),
            lambda: diffusion.generate_samples(config.sampling, masks, images, out, accelerator),
        ),
        Stage(
            "audit",
            own,
            {
                **{**real, "samples": sampled, "encoder": encoder_file, "format": audit.AUDIT_FORMAT},
                "audit": replace(config.audit, drop_copies=False),
            },
            ("audit/audit.json", "audit/closest.png"),
            lambda: assessment.audit_samples(
                config.audit, extractor() if encoder else None, images(), samples, own / "audit", accelerator
            ),
            config.audit.enabled,
        ),
        Stage(
            "drop_copies",
            own,
            {"audit": audit_file},
            (),
            lambda: assessment.drop_copies(samples, audit_file, accelerator),
            config.audit.enabled and config.audit.drop_copies,
        ),
        Stage(
            "quality",
            own,
            {
                **{**real, "samples": samples, "encoder": encoder_file or vae, "metrics": METRICS},
                "quality": replace(config.quality, encoder=None),
            },
            ("quality/quality.json", "quality/quality.md"),
            lambda: assessment.evaluate_quality(
                config.quality, extractor(), images(), samples, own / "quality", accelerator
            ),
            config.quality.enabled,
        ),
        Stage(
            "filter",
            own,
            {
                **{**real, "samples": samples, "run": find_weights(Path(run), "best") if run else None},
                "quantile": config.filter.quantile,
            },
            ("filter/filter.json", "pairs"),
            lambda: filter_pairs(config.filter, images(), samples, own / "filter", own / "pairs", accelerator),
            run is not None,
        ),
        Stage(
            "gallery",
            own,
            {**real, "vae": vae, "samples": samples},
            ("gallery.png",),
            lambda: assessment.save_gallery(images(), vae.parent, samples, own / "gallery.png", accelerator),
        ),
    ]
    last = next(i for i, stage in enumerate(stages) if stage.name == config.until)
    return [stage for stage in stages[: last + 1] if stage.enabled]
