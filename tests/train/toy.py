"""A toy task for the training loop, and a program that tests start on several ranks, or kill: toy.py FOLDER OPTIONS.

OPTIONS is JSON: keys of LoopConfig, `size`, `stop_at`, `nan_at` with the rank `nan_on`, `seen`, a folder, and for
rank 1 `slow` (seconds that its eighth image takes) and `killed_at` (the step after which it dies).
"""

import json
import logging
import os
import signal
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from mgcc_dist.common.distributed import create_accelerator
from mgcc_dist.common.errors import run_program
from mgcc_dist.data.loader import ImageTrainLoader, Ranks, Stream
from mgcc_dist.data.sample import Sample
from mgcc_dist.train.config import LoopConfig
from mgcc_dist.train.loop import fit

logger = logging.getLogger("mgcc_dist.toy")

CONFIG = LoopConfig(epochs=2, learning_rate=0.1, ema_decay=0.9, log_every=2, checkpoint_every=3, schedule="poly")


class Numbers:
    """12 flat grey images of 8x8. Reading the eighth time takes `slow` seconds."""

    def __init__(self, slow=0.0):
        self.slow, self.reads = slow, 0

    def __len__(self):
        return 12

    def __getitem__(self, i):
        self.reads += 1
        time.sleep(self.slow if self.reads == 8 else 0)
        return Sample(f"n{i}", np.full((8, 8), 20 * i, np.uint8), None, {})


class Toy(nn.Module):
    """Fits its weight to the mean grey value of the images, with noise from the global generator.

    `seen` collects (step, sample offset, key) of every image; at step `nan_at` the loss is NaN.
    """

    def __init__(self, size=(), nan_at=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.nan_at = nan_at
        self.seen = []

    def forward(self, batch, progress):
        self.seen += [(progress.step, *image) for image in zip(batch.offsets.tolist(), batch.keys, strict=True)]
        noise = torch.rand(len(batch.images), device=batch.images.device)
        target = batch.images.mean(dim=(1, 2, 3)) + 0.1 * noise
        loss = (self.weight.mean() - target).square().mean()
        return {"loss": loss * float("nan") if progress.step == self.nan_at else loss}


class ToyTask:
    """Two images per batch; after step `stop_at` it sends itself Slurm's stop signal."""

    name = "toy"
    best_metric = "error"
    best_is_higher = False

    def __init__(self, module=None, batch=2, rank=0, world=1, stop_at=None, slow=0.0, killed_at=None):
        self.module = module or Toy()
        images = Stream(Numbers(slow), batch)
        self.loader = ImageTrainLoader(None, images, image_size=8, seed=0, ranks=Ranks(rank, world))
        self.stop_at, self.killed_at = stop_at, killed_at
        self.steps_seen = []

    def after_step(self, progress):
        self.steps_seen.append(progress.step)
        if progress.step + 1 == self.stop_at:
            os.kill(os.getpid(), signal.SIGUSR2)
        if progress.step + 1 == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def validate(self, module, accelerator):
        return {"error": module.weight.abs().mean().item()}

    def network(self, module):
        return module

    def header(self):
        return {}


def run(folder, config=CONFIG, task=None):
    """Train the toy on one rank, in this process; return the task and its final state."""
    task = task or ToyTask()
    state = fit(task, config, folder, Accelerator(cpu=True, gradient_accumulation_steps=config.accumulation))
    return task, state


def main():
    """Train on this rank; write the images that it saw to SEEN/RANK-STEPS.json."""
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    known = {field.name for field in fields(LoopConfig)}
    config = replace(CONFIG, **{key: value for key, value in options.items() if key in known})
    accelerator = create_accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    logger.info("world size %d", world)
    nan_at = options.get("nan_at") if rank == options.get("nan_on") else None
    harm = {key: options[key] for key in ("slow", "killed_at") if key in options and rank == 1}
    module = Toy(options.get("size", ()), nan_at)
    task = ToyTask(module, rank=rank, world=world, stop_at=options.get("stop_at"), **harm)
    try:
        fit(task, config, folder, accelerator)
    finally:
        if "seen" in options:
            path = Path(options["seen"]) / f"{rank}-{len(task.steps_seen)}.json"
            path.write_text(json.dumps(task.module.seen))


if __name__ == "__main__":
    run_program("toy", main)
