"""Synthetic images by DDIM (Section IV-B.1), written as a shard folder by any number of ranks.

Image i starts from noise of its own generator, seeded by (seed, i), and no noise is added on the way (eta 0): it
depends on the checkpoint, the seed and i alone. Shard k holds the images k·per_shard to (k+1)·per_shard - 1 and is
made by one rank; missing shards are dealt to the ranks in turn. Shards appear whole, each followed by its entry for
index.json, so a start after a kill makes only what is missing; index.json comes last. `request.json` says what the
folder is a sample of, and nothing else is ever added to it.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import LDMPipeline
from tqdm import tqdm

from mgcc_dist.config import NonNegativeInt, PositiveInt
from mgcc_dist.data.records import Sample, write_index, write_shard
from mgcc_dist.diffusion import pipeline as pipelines
from mgcc_dist.diffusion.noise import Draw, generators
from mgcc_dist.errors import UserError
from mgcc_dist.files import read_json, write_json
from mgcc_dist.train.signals import EXIT_STOPPED, StopSignal

ENTRIES = "entries"


@dataclass(frozen=True)
class SamplingConfig:
    count: PositiveInt = 725
    """synthetic images to make (paper: 725 for BUSI, which professionals chose out of more)"""
    steps: PositiveInt = 100
    """DDIM steps (paper: 100)"""
    seed: NonNegativeInt = 0
    """of the noise that the images start from"""
    per_shard: PositiveInt = 64
    """images a shard; a rank makes a whole shard at a time"""
    batch: PositiveInt = 16
    """images made at once by a rank; changes speed and memory, and images by no more than rounding"""


def is_finished(config: SamplingConfig, pipeline: Path, folder: Path) -> bool:
    """Whether `folder` holds all of the images that are asked for.

    Raises:
        UserError: it holds images of another checkpoint, seed, number or count of steps.
    """
    if not (folder / "request.json").is_file():
        return False
    made, asked = read_json(folder / "request.json"), _request(config, pipeline)
    for key, value in asked.items():
        if made.get(key) != value:
            raise UserError(
                f"{folder} holds images made with {key} {made.get(key)}, not {value}; "
                "delete the folder, or choose another --out"
            )
    return (folder / "index.json").is_file()


def sample(config: SamplingConfig, pipeline: Path, folder: Path, accelerator: Accelerator) -> None:
    """Make what is missing of the shard folder. Collective.

    Raises:
        SystemExit: with EXIT_STOPPED after a signal, once the shards in hand are written.
    """
    request = _request(config, pipeline)
    names = [f"synthetic-{start:06d}.tar" for start in range(0, config.count, config.per_shard)]
    if accelerator.is_main_process:
        write_json(folder / "request.json", request)
    # The main process alone looks at the disk, so that all ranks deal out the same list.
    missing = [shard for shard, name in enumerate(names) if not _entry(folder, name).is_file()]
    missing = broadcast_object_list([missing])[0]
    model = pipelines.load(pipeline).to(accelerator.device)
    model.set_progress_bar_config(disable=True)

    rank, world = accelerator.process_index, accelerator.num_processes
    mine = missing[rank::world]
    images = sum(len(_indices(config, shard)) for shard in mine)
    who = f"sampling (rank {rank} of {world})" if world > 1 else "sampling"
    with (
        StopSignal() as stop,
        tqdm(total=images, desc=who, unit="image", disable=not accelerator.is_main_process, dynamic_ncols=True) as bar,
    ):
        for turn in range(0, len(missing), world):
            if turn + rank < len(missing):
                shard = missing[turn + rank]
                name = names[shard]
                entry = write_shard(folder / name, _draw(model, config, shard, request["checkpoint"], accelerator, bar))
                write_json(_entry(folder, name), entry)
            if stop.agreed():
                accelerator.print("sampling: stopped by a signal; the same command goes on from here")
                raise SystemExit(EXIT_STOPPED)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_index(folder, "synthetic", [read_json(_entry(folder, name)) for name in names], request=request)
        shutil.rmtree(folder / ENTRIES)
    accelerator.wait_for_everyone()


def _draw(
    model: LDMPipeline, config: SamplingConfig, shard: int, checkpoint: str, accelerator: Accelerator, bar: tqdm
) -> Iterator[Sample]:
    """The images of one shard."""
    indices = _indices(config, shard)
    for start in range(0, len(indices), config.batch):
        chosen = indices[start : start + config.batch]
        with accelerator.autocast():
            pictures = model(
                batch_size=len(chosen),
                generator=generators(config.seed, Draw.SAMPLE, chosen),
                num_inference_steps=config.steps,
                eta=0.0,
            ).images
        for index, picture in zip(chosen, pictures, strict=True):
            meta = {
                "dataset": "synthetic",
                "class": "synthetic",
                "original_size": list(picture.size),
                "checkpoint": checkpoint,
                "seed": config.seed,
                "index": index,
            }
            yield Sample(f"synthetic-{index:06d}", np.asarray(picture), None, meta)
            bar.update()


def _indices(config: SamplingConfig, shard: int) -> range:
    start = shard * config.per_shard
    return range(start, min(start + config.per_shard, config.count))


def _request(config: SamplingConfig, pipeline: Path) -> dict[str, Any]:
    """All that the folder's content depends on."""
    return {
        "checkpoint": pipelines.fingerprint(pipeline),
        "seed": config.seed,
        "steps": config.steps,
        "count": config.count,
        "per_shard": config.per_shard,
    }


def _entry(folder: Path, name: str) -> Path:
    return folder / ENTRIES / f"{name}.json"
