"""Synthetic images (Section IV-B.1), written as a shard folder by any number of ranks.

Image i starts from noise of its own generator, seeded by (seed, i), and no noise is added on the way: it depends on the
checkpoint, the seed and i alone. Shard k holds the images k·per_shard to (k+1)·per_shard - 1 and is made by one rank;
`data/shard_writer.py` says how the ranks share the shards, and what a kill or a full disk leaves. A background thread
compresses and writes images while the next ones are sampled.
"""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from mgcc_dist.data.records import Sample, write_index, write_shard
from mgcc_dist.data.shard_writer import fill, is_filled
from mgcc_dist.diffusion import pipeline as pipelines
from mgcc_dist.diffusion.config import SamplingConfig
from mgcc_dist.diffusion.sampler import Sampler, class_of, starting_noise


def is_finished(config: SamplingConfig, pipeline: Path, folder: Path, accelerator: Accelerator) -> bool:
    """Whether `folder` holds all of the images that are asked for.

    Raises:
        UserError: it holds images of another checkpoint, seed, number or way of sampling.
    """
    return is_filled(folder, _request(config, pipeline, accelerator), "images")


def sample(config: SamplingConfig, pipeline: Path, folder: Path, accelerator: Accelerator) -> None:
    """Make what is missing of the shard folder. Collective.

    Raises:
        UserError: the pipeline is not a whole one of this program, or the disk is full; what was written is kept.
        SystemExit: with EXIT_STOPPED after a signal, once the shards in hand are written.
    """
    request = _request(config, pipeline, accelerator)
    model = pipelines.load(pipeline)
    half = request["precision"] == "bf16"
    sampler = Sampler(model, config.sampler, config.steps, config.guidance, half, config.compile, accelerator.device)
    names, counts = list(model.classes), list(model.classes.values())

    def make(items: range, bar: tqdm) -> list[Sample]:
        samples = []
        for start in range(0, len(items), config.batch):
            indices = list(items[start : start + config.batch])
            # Compiled networks know one size of batch; the images too many are dropped.
            spare = config.batch - len(indices) if config.compile else 0
            padded = indices + indices[-1:] * spare
            labels = [class_of(i, counts) for i in padded] if counts else None
            images = sampler.images(starting_noise(config.seed, padded, model.latent_shape), labels)
            classes = [names[label] for label in labels] if labels else ["synthetic"] * len(padded)
            for index, image, category in zip(indices, images, classes, strict=False):
                meta = {
                    "dataset": "synthetic",
                    "class": category,
                    "original_size": [image.shape[1], image.shape[0]],
                    "checkpoint": request["checkpoint"],
                    "seed": config.seed,
                    "index": index,
                }
                samples.append(Sample(f"synthetic-{index:06d}", image, None, meta))
            bar.update(len(indices))
        return samples

    fill(
        folder,
        request,
        [
            (f"synthetic-{start:06d}.tar", range(start, min(start + config.per_shard, config.count)))
            for start in range(0, config.count, config.per_shard)
        ],
        make,
        write_shard,
        lambda entries: write_index(folder, "synthetic", entries, request=request),
        "sampling",
        accelerator,
    )


def _request(config: SamplingConfig, pipeline: Path, accelerator: Accelerator) -> dict[str, Any]:
    """All that the folder's content depends on."""
    return {
        "checkpoint": pipelines.fingerprint(pipeline),
        "seed": config.seed,
        "sampler": config.sampler,
        "steps": config.steps,
        "guidance": config.guidance,
        "precision": config.precision or ("bf16" if accelerator.mixed_precision == "bf16" else "no"),
        "count": config.count,
        "per_shard": config.per_shard,
    }
