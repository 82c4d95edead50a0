"""The trained model as a folder that stock diffusers loads: `DiffusionPipeline.from_pretrained(folder)`.

With a U-Net it is an `LDMPipeline` (unconditional latent diffusion), which samples noise, denoises it, divides by the
autoencoder's `scaling_factor` and decodes. It calls its autoencoder `vqvae` and warns at loading that ours is not a
VQModel. An `AutoencoderKL` provides everything that the pipeline uses. The layout is `vqvae/`, `unet/`, `scheduler/`
and `model_index.json`, plus `source.json` with the hashes of the weights from which the pipeline was built.

A class-conditional model also has `classes.json`, and the last class of its U-Net is the null class. diffusers loads
that folder too, but has no pipeline that passes class labels to a `UNet2DModel`: calling it fails with "class_labels
should be provided". The U-Net of a model with masks has one more input channel than the latents have, the mask.
`pipe.unet = unconditional_unet(pipe.unet)` makes either callable.

With a DiT it is a `DiTPipeline`, with the folders `vae/` and `transformer/`. `pipe([0, 1], guidance_scale=1)` samples
classes 0 and 1; a model without classes has class 0 only. Other guidance scales fail, because the pipeline expects
the 1000 classes of ImageNet.

A denoiser or an autoencoder of a plugin is saved in the same files as with a U-Net: its weights, and the config from
which it is built again. diffusers does not load that folder.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from mgcc_dist.common.config import Layer, as_plain, resolve
from mgcc_dist.common.errors import UserError, reason_of
from mgcc_dist.common.files import InvalidJson, link, read_json, read_object, sha256_of, share_files, write_json
from mgcc_dist.common.migration import current, with_version
from mgcc_dist.diffusion import autoencoder
from mgcc_dist.diffusion.autoencoder import Autoencoder, latent_shape
from mgcc_dist.diffusion.config import DenoiserConfig, DiTDenoiserConfig
from mgcc_dist.diffusion.denoiser import DIFFUSERS_MODELS, build
from mgcc_dist.diffusion.objective import load_scheduler, pipeline_scheduler
from mgcc_dist.diffusion.weights import load_weights
from mgcc_dist.train.weights_file import save_weights


@dataclass(frozen=True)
class Layout:
    """Names of the folders of the autoencoder and the denoiser."""

    vae: str
    denoiser: str

    @property
    def vae_weights(self) -> str:
        return f"{self.vae}/{SAFETENSORS_WEIGHTS_NAME}"

    @property
    def denoiser_weights(self) -> str:
        return f"{self.denoiser}/{SAFETENSORS_WEIGHTS_NAME}"

    @property
    def files(self) -> list[str]:
        """Everything that a sample depends on."""
        networks = [
            f"{name}/{file}" for name in (self.vae, self.denoiser) for file in ("config.json", SAFETENSORS_WEIGHTS_NAME)
        ]
        return [*networks, "scheduler/scheduler_config.json"]


LDM = Layout("vqvae", "unet")
DIT = Layout("vae", "transformer")
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
    gets those of the pipeline's own files. `weights` names existing files that hold the same weights as the pipeline's
    `vae_weights` and `denoiser_weights`; they are linked.
    """
    scratch = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(scratch, ignore_errors=True)
    layout = planned_layout(config)
    scheduler = pipeline_scheduler(config)
    stock = _stock_pipeline(layout, vae, unet, scheduler, classes)
    if stock:
        stock.save_pretrained(scratch)
    else:
        vae.save_pretrained(scratch / layout.vae)
        scheduler.save_pretrained(scratch / "scheduler")
        _save_denoiser(unet, config, len(classes), scratch / layout.denoiser)
    if config.classes:
        write_json(scratch / CLASSES_FILE, classes)
    for name, path in (weights or {}).items():
        link(path, scratch / name)
    files = {name: sha256_of(scratch / name) for name in layout.files}
    write_json(scratch / "source.json", {**source, "files": files})
    share_files(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def planned_layout(config: DenoiserConfig) -> Layout:
    """Return the layout of the pipeline of a denoiser."""
    return DIT if isinstance(config, DiTDenoiserConfig) else LDM


def files(config: DenoiserConfig) -> list[str]:
    """Return the files of a pipeline on which its samples depend."""
    return planned_layout(config).files + [CLASSES_FILE] * config.classes


def vae_folder(folder: Path) -> Path:
    """Return where the pipeline in `folder` has its autoencoder."""
    return folder / _layout(folder).vae


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
    if not all((folder / name).is_file() for name in _layout(folder).files):
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
    layout = _layout(folder)
    for name in layout.files:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: does not exist, so {folder} is not a complete pipeline of `mgcc ldm`. {REBUILD}"
            )
    try:
        vae = autoencoder.load_pretrained(folder / layout.vae)
        unet, masks = _load_denoiser(vae, folder / layout.denoiser)
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
    files = _layout(folder).files
    if (folder / CLASSES_FILE).is_file():
        files.append(CLASSES_FILE)
    return hashlib.sha256("".join(sha256_of(folder / name) for name in files).encode()).hexdigest()


def _stock_pipeline(
    layout: Layout, vae: Autoencoder, unet: nn.Module, scheduler: SchedulerMixin, classes: dict[str, int]
) -> DiffusionPipeline | None:
    """Return the pipeline of diffusers for these networks; None if it has none."""
    if not isinstance(vae, AutoencoderKL):
        return None
    if isinstance(unet, UNet2DModel) and layout == LDM:
        return LDMPipeline(vqvae=vae, unet=unet, scheduler=scheduler)
    if isinstance(unet, DiTTransformer2DModel) and layout == DIT:
        stock = DiTPipeline(transformer=unet, vae=vae, scheduler=scheduler)
        stock.register_to_config(id2label={str(label): name for label, name in enumerate(classes)})
        return stock
    return None


def _save_denoiser(denoiser: nn.Module, config: DenoiserConfig, classes: int, folder: Path) -> None:
    if isinstance(denoiser, DIFFUSERS_MODELS):
        denoiser.save_pretrained(folder)
        return
    folder.mkdir()
    write_json(folder / "config.json", with_version({"denoiser": as_plain(config), "classes": classes}))
    save_weights(denoiser.state_dict(), folder / SAFETENSORS_WEIGHTS_NAME)


def _load_denoiser(vae: Autoencoder, folder: Path) -> tuple[nn.Module, bool]:
    """Return the denoiser, and whether it gets a mask."""
    content = read_json(folder / "config.json")
    if "denoiser" not in content:
        models = {model.__name__: model for model in DIFFUSERS_MODELS}
        if content.get("_class_name") not in models:
            raise ValueError(f"{folder.name} is a {content.get('_class_name')}, not a {' or '.join(models)}")
        # With low_cpu_mem_usage=False, weights that do not fit raise an error instead of staying random.
        unet = models[content["_class_name"]].from_pretrained(folder, low_cpu_mem_usage=False)
        return unet, unet.config.in_channels > unet.config.out_channels
    source = str(folder / "config.json")
    content = current(content, source)
    config = resolve(DenoiserSection, [Layer({"denoiser": content["denoiser"]}, source)]).denoiser
    denoiser = build(config, latent_shape(vae), content["classes"])
    load_weights(denoiser, folder / SAFETENSORS_WEIGHTS_NAME)
    return denoiser, config.mask_channels > 0


def _layout(folder: Path) -> Layout:
    """Return the layout of the pipeline in `folder`."""
    return DIT if (folder / DIT.denoiser).is_dir() else LDM


def _check_components(vae: Autoencoder, unet: nn.Module, classes: dict[str, int], folder: Path) -> None:
    """Raise UserError if the components do not belong to one model."""
    layout = _layout(folder)
    if isinstance(unet, DIFFUSERS_MODELS):
        vae_channels, vae_size, _ = latent_shape(vae)
        channels, size = unet.config.out_channels, unet.config.sample_size
        if (vae_channels, vae_size) != (channels, size):
            raise UserError(
                f"{folder}: {layout.denoiser}/ takes latents of {channels} channels and {size}x{size} pixels, but "
                f"{layout.vae}/ produces {vae_channels} channels and {vae_size}x{vae_size} pixels. {REBUILD}"
            )
        if isinstance(unet, DiTTransformer2DModel):
            found, expected = unet.config.num_embeds_ada_norm, len(classes) or 1  # one class stands for none
        else:
            found, expected = (unet.config.num_class_embeds or 1) - 1, len(classes)  # without the null class
        if found != expected:
            raise UserError(
                f"{folder}: {layout.denoiser}/ has {found} classes, but {CLASSES_FILE} has {len(classes)}. {REBUILD}"
            )
    source = read_json(folder / "source.json") if (folder / "source.json").is_file() else {}
    weights = folder / layout.vae / SAFETENSORS_WEIGHTS_NAME
    if "autoencoder" in source and sha256_of(weights) != source["autoencoder"]:
        raise UserError(
            f"{weights}: is not the autoencoder on whose latents {layout.denoiser}/ was trained (source.json). "
            f"{REBUILD}"
        )
