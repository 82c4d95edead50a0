"""The stages of `mgcc_dist.ldm` that make images, from the data to `samples/`. Each returns at once where its result
is there already."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from mgcc_dist.common.distributed import start
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.datasets import Phantoms
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.splits import locate_split, make_split, read_split, write_split
from mgcc_dist.diffusion import autoencoder, denoiser, latents, pipeline, sampling
from mgcc_dist.diffusion.autoencoder import AutoencoderTask
from mgcc_dist.diffusion.config import AutoencoderConfig, DataConfig, DenoiserConfig, SamplingConfig
from mgcc_dist.diffusion.denoiser import DenoiserTask
from mgcc_dist.diffusion.images import Images
from mgcc_dist.diffusion.latents import Latents
from mgcc_dist.train.loop import Task, TrainState, fit
from mgcc_dist.train.metrics_logger import read_rows
from mgcc_dist.train.run_folder import is_finished, open_run_folder, write_result
from mgcc_dist.train.weights import count_parameters


@dataclass(frozen=True)
class AutoencoderRun:
    """What `autoencoder/` depends on."""

    data: DataConfig
    autoencoder: AutoencoderConfig


@dataclass(frozen=True)
class DenoiserRun:
    """What `denoiser/` depends on."""

    data: DataConfig
    denoiser: DenoiserConfig
    autoencoder_sha256: str


def open_images(config: DataConfig, out: Path, accelerator: Accelerator) -> Images:
    """The images to learn; makes phantom images and split when none are given."""
    if not config.shards and not config.phantom:
        raise UserError(
            "data.shards is not given; BUSI's are made by "
            "`python -m mgcc_dist.shards busi --root Dataset_BUSI_with_GT --out out/busi`, then --data.shards out/busi"
        )
    folder = Path(config.shards) if config.shards else out / "phantom"
    if accelerator.is_main_process and not config.shards:
        write_shards(Phantoms(config.phantom, seed=0, size=config.image_size), folder)
    accelerator.wait_for_everyone()
    data = ShardFolder.open(folder, verify=accelerator.is_local_main_process)

    path = locate_split(config.split) if config.split else out / "split.json"
    if accelerator.is_main_process and not config.split and not path.is_file():
        held_out = round(0.3 * len(data))
        labeled = (len(data) - held_out) // 2
        split = make_split(data.records, seed=0, validation=held_out, labeled=labeled, grouped=True, name="split")
        write_split(path, split)
    accelerator.wait_for_everyone()
    return Images(config, data, read_split(path))


def train_autoencoder(config: AutoencoderConfig, data: DataConfig, images: Images, out: Path) -> None:
    """Leaves `autoencoder/vae/`, whose latents are standardised, in its run folder."""
    folder, loop = out / "autoencoder", config.loop
    accelerator = start(loop.precision, loop.accumulation)
    open_run_folder(folder, AutoencoderRun(data, config), accelerator)
    if is_finished(folder):
        accelerator.print(f"autoencoder: {folder / 'result.json'} is there already")
        return
    set_seed(loop.seed)
    task = AutoencoderTask(config, images, accelerator)
    state = fit(task, loop, folder, accelerator)

    vae = autoencoder.load(config, images.size, folder / "last").to(accelerator.device)
    once = images.training_once(config.batch, accelerator)
    mean, std = autoencoder.latent_moments(vae, once.batches(), accelerator)
    autoencoder.standardise(vae, mean, std)
    if accelerator.is_main_process:
        vae.save_pretrained(folder / "vae")
    facts = {"latent_mean": mean.tolist(), "latent_std": std.tolist()}
    _write_result(task, facts, state, images, loop.seed, folder, accelerator)


def encode_images(config: AutoencoderConfig, images: Images, out: Path, accelerator: Accelerator) -> Latents:
    """Leaves `latents/`. Needs `autoencoder/vae/`."""
    folder = out / "autoencoder" / "vae"
    vae = autoencoder.load_finished(folder)
    sha256 = sha256_of(folder / autoencoder.WEIGHTS)
    return latents.encode(vae, sha256, images, config.batch, out / "latents", accelerator)


def train_denoiser(config: DenoiserConfig, data: DataConfig, images: Images, encoded: Latents, out: Path) -> None:
    """Leaves `denoiser/`, a run folder."""
    folder, loop = out / "denoiser", config.loop
    accelerator = start(loop.precision, loop.accumulation)
    open_run_folder(folder, DenoiserRun(data, config, encoded.autoencoder), accelerator)
    if is_finished(folder):
        accelerator.print(f"denoiser: {folder / 'result.json'} is there already")
        return
    set_seed(loop.seed)
    task = DenoiserTask(config, encoded, accelerator)
    state = fit(task, loop, folder, accelerator)
    _write_result(task, {}, state, images, loop.seed, folder, accelerator)


def save_pipeline(config: DenoiserConfig, encoded: Latents, out: Path, accelerator: Accelerator) -> None:
    """Put both networks into `pipeline/`, in diffusers' layout."""
    folder = out / "pipeline"
    source = {
        "autoencoder": encoded.autoencoder,
        "denoiser": sha256_of(out / "denoiser" / "last" / "model.safetensors"),
    }
    if pipeline.is_made_of(source, folder):
        accelerator.print(f"pipeline: {folder} is there already")
    elif accelerator.is_main_process:
        vae = autoencoder.load_finished(out / "autoencoder" / "vae")
        unet = denoiser.load(config, encoded, out / "denoiser" / "last")
        pipeline.save(vae, unet, denoiser.build_schedule(config), encoded.classes, source, folder)
        print(f"pipeline: diffusers reads it from {folder}")
    accelerator.wait_for_everyone()


def draw_samples(config: SamplingConfig, out: Path, accelerator: Accelerator) -> None:
    """Fill `samples/` with synthetic images."""
    folder = out / "samples"
    if sampling.is_finished(config, out / "pipeline", folder, accelerator):
        accelerator.print(f"samples: {folder / 'index.json'} is there already")
        return
    sampling.sample(config, out / "pipeline", folder, accelerator)
    accelerator.print(f"samples: {config.count} synthetic images -> {folder}")


def _write_result(
    task: Task,
    facts: dict[str, Any],
    state: TrainState,
    images: Images,
    seed: int,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    """Mark a training stage as finished."""
    last = [row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "validation"][-1]
    result = {
        "program": "ldm",
        "stage": task.name,
        **images.facts,
        "seed": seed,
        "parameters": count_parameters(task.module),
        **facts,
        "best": state.best,
        "last": {key: value for key, value in last.items() if key != "split"},
        "steps": state.step,
        "seconds": {"training": round(state.seconds, 1)},
    }
    write_result(folder, result, accelerator)
