"""The trained model as a folder that plain diffusers reads: `DiffusionPipeline.from_pretrained(folder)`.

The stock `LDMPipeline` (unconditional latent diffusion) fits: it draws noise, denoises it, divides by the autoencoder's
`scaling_factor`, decodes. It calls its autoencoder `vqvae` and warns, when it loads, that ours is not a VQModel; an
`AutoencoderKL` has all that it asks for. So the layout is `vqvae/`, `unet/`, `scheduler/`, `model_index.json`, and
beside them `source.json`, which says what weights it was made of.
"""

import hashlib
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, LDMPipeline, UNet2DModel

from mgcc_dist.files import read_json, sha256_of, write_json

# All that an image depends on.
PARTS = (
    "vqvae/config.json",
    "vqvae/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
)


def save(vae: AutoencoderKL, unet: UNet2DModel, schedule: DDPMScheduler, source: dict[str, str], folder: Path) -> None:
    """Write the pipeline, with DDIM for sampling; the folder appears whole, in place of an older one.

    `source` is the sha256 of the weights of each training stage.
    """
    scratch = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(scratch, ignore_errors=True)
    LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler.from_config(schedule.config)).save_pretrained(scratch)
    write_json(scratch / "source.json", source)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def is_made_of(source: dict[str, str], folder: Path) -> bool:
    path = folder / "source.json"
    return path.is_file() and read_json(path) == source


def load(folder: Path) -> LDMPipeline:
    """The pipeline, part by part, which spares the user diffusers' warning about the autoencoder's class."""
    return LDMPipeline(
        vqvae=AutoencoderKL.from_pretrained(folder / "vqvae"),
        unet=UNet2DModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
    )


def fingerprint(folder: Path) -> str:
    """One sha256 of weights and settings of all parts."""
    return hashlib.sha256("".join(sha256_of(folder / part) for part in PARTS).encode()).hexdigest()
