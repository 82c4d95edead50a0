"""The trained model as a folder that stock diffusers loads: `DiffusionPipeline.from_pretrained(folder)`.

The stock `LDMPipeline` (unconditional latent diffusion) fits: it samples noise, denoises it, divides by the
autoencoder's `scaling_factor` and decodes. It calls its autoencoder `vqvae` and warns at loading that ours is not a
VQModel. An `AutoencoderKL` provides everything that the pipeline uses. The layout is `vqvae/`, `unet/`, `scheduler/`
and `model_index.json`, plus `source.json` with the hashes of the weights from which the pipeline was built.

A class-conditional model also has `classes.json`, and the last class of its U-Net is the null class. diffusers loads
that folder too, but has no pipeline that passes class labels to a `UNet2DModel`: calling it fails with "class_labels
should be provided". The U-Net of a model with masks has one more input channel than the latents have, the mask.
`pipe.unet = unconditional_unet(pipe.unet)` makes either callable.

A denoiser or an autoencoder of a plugin is saved in the same files: its weights, and the config from which it is built
again. diffusers does not load that folder.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL, LDMPipeline, SchedulerMixin, UNet2DModel
from torch import nn

from mgcc_dist.common.config import Layer, as_plain, resolve
from mgcc_dist.common.errors import UserError, reason_of
from mgcc_dist.common.files import InvalidJson, link, read_json, read_object, sha256_of, share_files, write_json
from mgcc_dist.common.migration import current, with_version
from mgcc_dist.diffusion import autoencoder
from mgcc_dist.diffusion.autoencoder import Autoencoder, latent_shape
from mgcc_dist.diffusion.config import DenoiserConfig
from mgcc_dist.diffusion.denoiser import build
from mgcc_dist.diffusion.objective import load_scheduler, pipeline_scheduler
from mgcc_dist.diffusion.weights import load_weights
from mgcc_dist.train.checkpoints import save_weights

# Everything that a sample depends on.
PIPELINE_FILES = (
    "vqvae/config.json",
    "vqvae/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
)
VAE_WEIGHTS = PIPELINE_FILES[1]
DENOISER_CONFIG, DENOISER_WEIGHTS = PIPELINE_FILES[2:4]
CLASSES_FILE = "classes.json"
REBUILD = "Move the folder elsewhere and run `mgcc ldm` again to rebuild it."


@dataclass(frozen=True)
class DenoiserSection:
    """A config that has only a denoiser."""

    denoiser: DenoiserConfig


@dataclass(frozen=True, eq=False)
class LatentDiffusionModel:
    """Autoencoder, denoiser and noise scheduler. `classes`: training images per class; empty if unconditional."""

    vae: Autoencoder
    unet: nn.Module
    """a denoiser, for `denoiser.predict`"""
    scheduler: SchedulerMixin
    classes: dict[str, int]
    masks: bool = False
    """whether the denoiser gets a lesion mask"""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C,h,w] of a latent."""
        return latent_shape(self.vae)


def save(
    vae: Autoencoder,
    unet: nn.Module,
    config: DenoiserConfig,
    classes: dict[str, int],
    source: dict[str, str],
    folder: Path,
    weights: Mapping[str, Path] | None = None,
) -> None:
    """Write the pipeline. An existing folder is replaced once the new one is complete.

    `unet` is a denoiser of `config`. `source` holds the sha256 of the weights of each training stage; source.json also
    gets those of the pipeline's own files. `weights` names files that already hold the weights of VAE_WEIGHTS and
    DENOISER_WEIGHTS; they are linked.
    """
    scratch = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(scratch, ignore_errors=True)
    scheduler = pipeline_scheduler(config)
    if isinstance(vae, AutoencoderKL) and isinstance(unet, UNet2DModel):
        LDMPipeline(vqvae=vae, unet=unet, scheduler=scheduler).save_pretrained(scratch)
    else:
        vae.save_pretrained(scratch / "vqvae")
        scheduler.save_pretrained(scratch / "scheduler")
        _save_denoiser(unet, config, len(classes), scratch)
    if config.classes:
        write_json(scratch / CLASSES_FILE, classes)
    for name, path in (weights or {}).items():
        link(path, scratch / name)
    files = {name: sha256_of(scratch / name) for name in PIPELINE_FILES}
    write_json(scratch / "source.json", {**source, "files": files})
    share_files(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def files(config: DenoiserConfig) -> tuple[str, ...]:
    """Return the files of a pipeline on which its samples depend."""
    return (*PIPELINE_FILES, CLASSES_FILE) if config.classes else PIPELINE_FILES


def is_up_to_date(source: dict[str, str], folder: Path) -> bool:
    """Return whether `folder` holds a pipeline that was built from the weights `source`.

    Raises:
        UserError: it does, but its files are not as they were written.
    """
    path = folder / "source.json"
    try:
        found = read_object(path) if path.is_file() else {}
    except InvalidJson:  # damaged: build it again
        return False
    if any(found.get(key) != value for key, value in source.items()):
        return False
    if not all((folder / name).is_file() for name in PIPELINE_FILES):
        return False
    for name, sha256 in found.get("files", {}).items():  # pipelines of earlier versions have none
        if sha256_of(folder / name) != sha256:
            raise UserError(f"{folder / name}: is damaged, or was changed since `mgcc ldm` wrote it. {REBUILD}")
    return True


def load(folder: Path) -> LatentDiffusionModel:
    """Load the pipeline's components one by one, which avoids diffusers' warning about the autoencoder's class.

    Raises:
        UserError: a component is missing, damaged or does not belong to the others.
    """
    for name in PIPELINE_FILES:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: does not exist, so {folder} is not a complete pipeline of `mgcc ldm`. {REBUILD}"
            )
    try:
        vae = autoencoder.load_pretrained(folder / "vqvae")
        unet, masks = _load_denoiser(vae, folder)
        scheduler = load_scheduler(folder / "scheduler")
        classes = read_json(folder / CLASSES_FILE) if (folder / CLASSES_FILE).is_file() else {}
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: cannot be loaded ({reason_of(error)}). {REBUILD}") from error
    _check_components(vae, unet, classes, folder)
    return LatentDiffusionModel(vae.eval(), unet.eval(), scheduler, classes, masks)


def unconditional_unet(unet: UNet2DModel) -> UNet2DModel:
    """Return ε_θ(z_t, t) of a U-Net with classes or masks as one without.

    The embedding of the null class is added to the bias of the time embedding. Where no mask is known its channel is 0,
    so the weights of that channel are left out.
    """
    channels = unet.config.out_channels
    unconditional = UNet2DModel.from_config({**unet.config, "num_class_embeds": None, "in_channels": channels})
    state = {name: value.clone() for name, value in unet.state_dict().items() if name != "class_embedding.weight"}
    state["conv_in.weight"] = state["conv_in.weight"][:, :channels]
    if unet.class_embedding is not None:
        state["time_embedding.linear_2.bias"] += unet.class_embedding.weight.detach()[-1]
    unconditional.load_state_dict(state)
    return unconditional.type(unet.dtype).to(unet.device).eval()


def fingerprint(folder: Path) -> str:
    """Return one sha256 over the weights and settings of all components."""
    files = [*PIPELINE_FILES, CLASSES_FILE] if (folder / CLASSES_FILE).is_file() else PIPELINE_FILES
    return hashlib.sha256("".join(sha256_of(folder / name) for name in files).encode()).hexdigest()


def _save_denoiser(denoiser: nn.Module, config: DenoiserConfig, classes: int, folder: Path) -> None:
    if isinstance(denoiser, UNet2DModel):
        denoiser.save_pretrained(folder / "unet")
        return
    (folder / "unet").mkdir()
    write_json(folder / DENOISER_CONFIG, with_version({"denoiser": as_plain(config), "classes": classes}))
    save_weights(denoiser.state_dict(), folder / DENOISER_WEIGHTS)


def _load_denoiser(vae: Autoencoder, folder: Path) -> tuple[nn.Module, bool]:
    """Return the denoiser, and whether it gets a mask."""
    content = read_json(folder / DENOISER_CONFIG)
    if "denoiser" not in content:
        # With low_cpu_mem_usage=False, weights that do not fit raise an error instead of staying random.
        unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
        return unet, unet.config.in_channels > unet.config.out_channels
    source = str(folder / DENOISER_CONFIG)
    content = current(content, source)
    config = resolve(DenoiserSection, [Layer({"denoiser": content["denoiser"]}, source)]).denoiser
    denoiser = build(config, latent_shape(vae), content["classes"])
    load_weights(denoiser, folder / DENOISER_WEIGHTS)
    return denoiser, config.mask_channels > 0


def _check_components(vae: Autoencoder, unet: nn.Module, classes: dict[str, int], folder: Path) -> None:
    """Raise UserError if the components do not belong to one model."""
    if isinstance(unet, UNet2DModel):
        vae_channels, vae_size, _ = latent_shape(vae)
        unet_channels, unet_size = unet.config.out_channels, unet.config.sample_size
        if (vae_channels, vae_size) != (unet_channels, unet_size):
            raise UserError(
                f"{folder}: unet/ takes latents of {unet_channels} channels and {unet_size}x{unet_size} pixels, but "
                f"vqvae/ produces {vae_channels} channels and {vae_size}x{vae_size} pixels. {REBUILD}"
            )
        unet_classes = (unet.config.num_class_embeds or 1) - 1  # without the null class
        if unet_classes != len(classes):
            raise UserError(
                f"{folder}: unet/ has {unet_classes} classes, but {CLASSES_FILE} has {len(classes)}. {REBUILD}"
            )
    source = read_json(folder / "source.json") if (folder / "source.json").is_file() else {}
    weights = folder / VAE_WEIGHTS
    if "autoencoder" in source and sha256_of(weights) != source["autoencoder"]:
        raise UserError(
            f"{weights}: is not the autoencoder on whose latents unet/ was trained (source.json). {REBUILD}"
        )
