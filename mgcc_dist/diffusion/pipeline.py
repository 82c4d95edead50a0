"""The trained model as a folder that plain diffusers reads: `DiffusionPipeline.from_pretrained(folder)`.

The stock `LDMPipeline` (unconditional latent diffusion) fits: it draws noise, denoises it, divides by the autoencoder's
`scaling_factor`, decodes. It calls its autoencoder `vqvae` and warns, when it loads, that ours is not a VQModel; an
`AutoencoderKL` has all that it asks for. So the layout is `vqvae/`, `unet/`, `scheduler/`, `model_index.json`, and
beside them `source.json`, which says what weights it was made of.

A model with classes has `classes.json` too, and its U-Net's last class means "any". diffusers loads that folder as
well, but has no pipeline that gives a `UNet2DModel` its classes: a call of the loaded one ends in diffusers' error
"class_labels should be provided". `pipe.unet = of_any_class(pipe.unet)` makes it callable.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, LDMPipeline, UNet2DModel

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_json, sha256_of, write_json

# All that an image depends on.
PARTS = (
    "vqvae/config.json",
    "vqvae/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
)
CLASSES = "classes.json"


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """What is sampled from. `classes`: how many training images there were of each; empty without classes."""

    vae: AutoencoderKL
    unet: UNet2DModel
    schedule: DDIMScheduler
    classes: dict[str, int]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C,h,w]"""
        return self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size


def save(
    vae: AutoencoderKL,
    unet: UNet2DModel,
    schedule: DDPMScheduler,
    classes: dict[str, int],
    source: dict[str, str],
    folder: Path,
) -> None:
    """Write the pipeline, with DDIM for sampling; the folder appears whole, in place of an older one.

    `source` is the sha256 of the weights of each training stage.
    """
    scratch = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(scratch, ignore_errors=True)
    LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler.from_config(schedule.config)).save_pretrained(scratch)
    if unet.config.num_class_embeds is not None:
        write_json(scratch / CLASSES, classes)
    write_json(scratch / "source.json", source)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def is_made_of(source: dict[str, str], folder: Path) -> bool:
    path = folder / "source.json"
    return path.is_file() and read_json(path) == source


def load(folder: Path) -> TrainedModel:
    """The model, part by part, which spares the user diffusers' warning about the autoencoder's class.

    Raises:
        UserError: a part is missing, damaged or of another model than the others.
    """
    for part in PARTS:
        if not (folder / part).is_file():
            raise UserError(f"{folder / part} is not there; {folder} is no pipeline of this program, make it again")
    try:
        # Weights that do not fit are an error, not left at random.
        vae = AutoencoderKL.from_pretrained(folder / "vqvae", low_cpu_mem_usage=False)
        unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
        schedule = DDIMScheduler.from_pretrained(folder / "scheduler")
        classes = read_json(folder / CLASSES) if (folder / CLASSES).is_file() else {}
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} does not load ({' '.join(str(error).split())[:300]}); make it again") from error
    _check(vae, unet, classes, folder)
    return TrainedModel(vae.eval(), unet.eval(), schedule, classes)


def of_any_class(unet: UNet2DModel) -> UNet2DModel:
    """ε_θ(z_t, t) of a network with classes as one without: "any class" becomes a bias of the time embedding."""
    config = {**unet.config, "num_class_embeds": None}
    plain = UNet2DModel.from_config(config)
    state = {name: value.clone() for name, value in unet.state_dict().items() if name != "class_embedding.weight"}
    state["time_embedding.linear_2.bias"] += unet.class_embedding.weight.detach()[-1]
    plain.load_state_dict(state)
    return plain.type(unet.dtype).to(unet.device).eval()


def fingerprint(folder: Path) -> str:
    """One sha256 of weights and settings of all parts."""
    parts = [*PARTS, CLASSES] if (folder / CLASSES).is_file() else PARTS
    return hashlib.sha256("".join(sha256_of(folder / part) for part in parts).encode()).hexdigest()


def _check(vae: AutoencoderKL, unet: UNet2DModel, classes: dict[str, int], folder: Path) -> None:
    """Raise UserError where the parts are not of one model."""
    size = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    made, taken = (vae.config.latent_channels, size), (unet.config.in_channels, unet.config.sample_size)
    if made != taken:
        raise UserError(
            f"{folder}: unet/ denoises latents of {taken[0]} channels and {taken[1]} pixels a side, but vqvae/ makes "
            f"{made[0]} and {made[1]}; make the pipeline again"
        )
    if (unet.config.num_class_embeds or 1) != len(classes) + 1:
        raise UserError(f"{folder}: unet/ has {unet.config.num_class_embeds} classes, but {CLASSES} {len(classes)}")
    source = read_json(folder / "source.json") if (folder / "source.json").is_file() else {}
    weights = folder / PARTS[1]
    if "autoencoder" in source and sha256_of(weights) != source["autoencoder"]:
        raise UserError(
            f"{weights} is not the autoencoder whose latents unet/ was trained on (see source.json); "
            "make the pipeline again"
        )
