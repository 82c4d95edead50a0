"""What the stages of `mgcc ldm` run: training, encoding, sampling (common/stages.py). All functions are collective."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import link, sha256_of
from mgcc_dist.common.finite import require_finite
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.records import ShardFolder, index_file
from mgcc_dist.data.sample import RecordInfo
from mgcc_dist.data.selection import restore_dropped, warn_if_synthetic
from mgcc_dist.data.shard_cache import open_cache
from mgcc_dist.data.splits import Split, locate_split, make_split, read_split, write_split
from mgcc_dist.diffusion import autoencoder, denoiser, latents, pipeline, sampling
from mgcc_dist.diffusion.autoencoder import AutoencoderTask, LoadFeatures
from mgcc_dist.diffusion.config import AutoencoderConfig, DataConfig, DenoiserConfig, Masks, SamplingConfig
from mgcc_dist.diffusion.denoiser import DenoiserTask
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.diffusion.latents import LatentData
from mgcc_dist.diffusion.warped_masks import WarpedMasks
from mgcc_dist.diffusion.weights import load_initial_weights
from mgcc_dist.train.initial_weights import WEIGHTS, describe_initial_weights, existing_weights
from mgcc_dist.train.loop import Task, TrainState, fit
from mgcc_dist.train.metrics_logger import read_rows
from mgcc_dist.train.run_folder import (
    check_inputs,
    check_run_folder,
    has_run,
    hash_inputs,
    open_run_folder,
    write_result,
)
from mgcc_dist.train.saved_run import is_finished, read_config, read_result
from mgcc_dist.train.weights import count_parameters
from mgcc_dist.train.weights_file import save_weights

logger = logging.getLogger(__name__)

VAE, UNET = f"autoencoder/vae/{SAFETENSORS_WEIGHTS_NAME}", f"denoiser/last/{WEIGHTS}"
"""final weights of both networks, in the output folder"""


@dataclass(frozen=True)
class AutoencoderRun:
    """Everything that `autoencoder/` depends on."""

    data: DataConfig
    autoencoder: AutoencoderConfig


@dataclass(frozen=True)
class DenoiserRun:
    """Everything that `denoiser/` depends on."""

    data: DataConfig
    denoiser: DenoiserConfig
    autoencoder_sha256: str


def locate_images(config: DataConfig, out: Path) -> tuple[Path | str, Path]:
    """Return the folder or URL of the shards and the split file, which need not exist yet.

    Raises:
        UserError: `config` has neither `shards` nor `phantom`, or names a split that does not exist.
    """
    if not config.shards and not config.phantom:
        raise UserError(
            "data.shards: no shard folder given. For BUSI, run `mgcc shards busi "
            "--root Dataset_BUSI_with_GT --out out/busi`, then pass --data.shards out/busi"
        )
    return config.shards or out / "phantom", locate_split(config.split) if config.split else out / "split.json"


def open_images(config: DataConfig, out: Path, accelerator: Accelerator) -> ImageData:
    """Open the training and validation images; generate phantom images or a split if the config names none."""
    source, path = locate_images(config, out)
    with raise_on_all_ranks():
        if accelerator.is_main_process and not config.shards:
            write_shards(Phantoms(config.phantom, seed=0, size=config.image_size), out / "phantom")
    cache = open_cache(config.cache, config.cache_gb)
    shards = ShardFolder.open(source, accelerator.is_local_main_process, cache)
    warn_if_synthetic(shards)
    if cache:
        cache.require_room(config.shard_window)
    with raise_on_all_ranks():
        if accelerator.is_main_process and not config.split and not path.is_file():
            write_split(path, _make_split(shards.records))
    return ImageData(config, shards, read_split(path), [path, index_file(source)])


def _make_split(records: Sequence[RecordInfo]) -> Split:
    """Split into 70 % training and 30 % validation images; masks do not matter, so some or all may be missing."""
    all_masks = all(record.labeled for record in records)
    validation = round(0.3 * len(records))
    labeled = (len(records) - validation) // 2 if all_masks else 0
    records = records if all_masks else [replace(record, labeled=False) for record in records]
    return make_split(records, seed=0, validation=validation, labeled=labeled, grouped=True, name="split")


def check_stages(
    data: DataConfig, first: AutoencoderConfig, second: DenoiserConfig, samples: SamplingConfig, out: Path
) -> None:
    """Check the settings against what `out` holds, before anything is written there.

    Raises:
        UserError: a stage was trained with other settings, or the samples have others.
    """
    sampling.check_folder(samples, out / samples.name / "samples")
    check_run_folder(out / "autoencoder", AutoencoderRun(data, first), _fixed_length(first, out))
    folder = out / "denoiser"
    if has_run(folder) and (folder / "config.yaml").is_file():
        trained_on = read_config(folder, DenoiserRun).autoencoder_sha256  # that of `out` may not exist yet
        check_run_folder(folder, DenoiserRun(data, second, trained_on), second.loop.fixed_length)


def check_masks(masks: Masks, images: ImageData, out: Path) -> None:
    """Check that a denoiser with `masks` has masks to train on and, before anything is trained, to sample with.

    Raises:
        UserError: it has not, or no training mask of a class can be warped into another one.
    """
    masked = images.masked(masks)
    if len(masked) and not is_finished(out / "autoencoder"):
        warped = WarpedMasks(masked, images.size)
        for name in warped.counts:
            warped.draw(name, seed=0, index=0)


def _fixed_length(config: AutoencoderConfig, out: Path) -> str:
    """Return why the autoencoder can't be trained further; "" if it can."""
    if (out / "latents").exists():
        return f"{out / 'latents'} was encoded with it"
    return config.loop.fixed_length


def train_autoencoder(
    config: AutoencoderConfig,
    data: DataConfig,
    images: ImageData,
    out: Path,
    accelerator: Accelerator,
    load_features: LoadFeatures | None = None,
) -> None:
    """Train the autoencoder in `autoencoder/` and save it, with normalized latents, in its `last/` and its `vae/`.

    `load_features` loads the network of the feature loss, if the config has one.
    """
    folder, loop = out / "autoencoder", config.loop
    open_run_folder(folder, AutoencoderRun(data, config), accelerator, _fixed_length(config, out))
    if _is_finished(folder, images) and (out / VAE).is_file():
        return
    set_seed(loop.seed)
    task = AutoencoderTask(config, images, accelerator, load_features)
    load_initial_weights(task.module.get_submodule("vae"), config.init, folder)
    weights = [*existing_weights(config.init, "last"), *existing_weights(config.losses.network, "best")]
    state = fit(task, loop, folder, accelerator, [*images.files, *weights])

    vae = autoencoder.load(config, images.size, folder / "last").to(accelerator.device)
    loader = images.train_eval_loader(config.batch, accelerator)
    mean, std = autoencoder.latent_moments(vae, loader.batches(), accelerator)
    require_finite(
        torch.stack([mean, std, 1 / std]).T,
        "autoencoder",
        [f"latent channel {channel} of the training images" for channel in range(len(mean))],
        "Move the stage's folder elsewhere and train it again with a lower learning rate.",
    )
    autoencoder.normalize_latents(vae, mean, std)
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            last = folder / "last" / WEIGHTS
            save_weights(vae.state_dict(), last, task.header() | {"step": state.step, "normalized": True})
            vae.save_config(folder / "vae")
            link(last, out / VAE)
    latent_stats = {"latent_mean": mean.tolist(), "latent_std": std.tolist()}
    init = describe_initial_weights(config.init, state.inputs)
    _write_result(task, {"init": init, **latent_stats}, state, images, loop.seed, folder, accelerator)


def encode_images(
    config: AutoencoderConfig, images: ImageData, out: Path, accelerator: Accelerator, masks: Masks = "none"
) -> LatentData:
    """Encode the images with `autoencoder/vae/` into `latents/`, with the masks that a denoiser may see."""
    vae = autoencoder.load_pretrained((out / VAE).parent)
    return latents.encode(vae, sha256_of(out / VAE), images, config.batch, out / "latents", accelerator, masks)


def train_denoiser(
    config: DenoiserConfig,
    data: DataConfig,
    images: ImageData,
    encoded: LatentData,
    out: Path,
    accelerator: Accelerator,
) -> None:
    """Train the denoiser in `denoiser/`."""
    folder, loop = out / "denoiser", config.loop
    open_run_folder(folder, DenoiserRun(data, config, encoded.autoencoder), accelerator, loop.fixed_length)
    if _is_finished(folder, images) and (out / UNET).is_file():
        return
    set_seed(loop.seed)
    task = DenoiserTask(config, encoded, accelerator)
    load_initial_weights(task.module.get_submodule("unet"), config.init, folder)
    state = fit(task, loop, folder, accelerator, [*images.files, *existing_weights(config.init, "last")])
    init = describe_initial_weights(config.init, state.inputs)
    _write_result(task, {"init": init}, state, images, loop.seed, folder, accelerator)


def save_pipeline(config: DenoiserConfig, encoded: LatentData, out: Path, accelerator: Accelerator) -> None:
    """Save both networks to `pipeline/` in the layout of diffusers; their weights are links to those of the stages."""
    folder = out / "pipeline"
    layout = pipeline.planned_layout(config)
    weights = {layout.vae_weights: out / VAE, layout.denoiser_weights: out / UNET}
    with raise_on_all_ranks():
        source = {"autoencoder": encoded.autoencoder, "denoiser": sha256_of(out / UNET)}
        if accelerator.is_main_process and not pipeline.is_up_to_date(source, folder):
            vae = autoencoder.load_pretrained(out / "autoencoder" / "vae")
            unet = denoiser.load(config, encoded, out / "denoiser" / "last")
            pipeline.save(vae, unet, config, encoded.classes, source, folder, weights)
            logger.info("pipeline: diffusers pipeline -> %s", folder)


def generate_samples(
    config: SamplingConfig, masks: Masks, images: Callable[[], ImageData], out: Path, accelerator: Accelerator
) -> None:
    """Generate the synthetic images in `samples/`, of a named set in NAME/samples/.

    A denoiser with masks gets those of training images, warped.
    """
    folder = out / config.name / "samples"
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            restore_dropped(folder)
    warped = WarpedMasks(images().masked(masks), images().size) if masks != "none" else None
    sampling.sample(config, out / "pipeline", folder, accelerator, warped)
    logger.info("samples: %d synthetic images -> %s", config.count, folder)


def _is_finished(folder: Path, images: ImageData) -> bool:
    """Return whether the stage is finished.

    Raises:
        UserError: it was trained on another split, or on other images.
    """
    if not is_finished(folder):
        return False
    check_inputs(folder, read_result(folder).get("inputs", {}), hash_inputs(images.files))
    return True


def _write_result(
    task: Task,
    extra: dict[str, Any],
    state: TrainState,
    images: ImageData,
    seed: int,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    """Write result.json, which marks a training stage as finished."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row.get("split") == "validation"]
    last = rows[-1] if rows else {"step": state.step}  # of a run whose metrics were deleted
    result = {
        "program": "ldm",
        "stage": task.name,
        **images.info,
        "inputs": state.inputs,
        "seed": seed,
        "parameters": count_parameters(task.module),
        **extra,
        "best": state.best,
        "last": {key: value for key, value in last.items() if key != "split"},
        "steps": state.step,
        "seconds": {"training": round(state.seconds, 1)},
    }
    write_result(folder, result, accelerator)
    logger.info("%s: finished -> %s", task.name, folder / "result.json")
