"""Time per training step of the denoiser on stored latents, compared with encoding the images in every step.

    python -m benchmarks.latents --shards out/busi --preset busi_small --out benchmarks/results/latents.json

pixels   images from the loader, encoded by the frozen autoencoder within the step
latents  posteriors that were encoded once and stored (that time is reported too)

Both train the same network with the same loss on the same samples and noise, and are measured alternately. Each time is
the median over the rounds, and the ratio the median of the rounds' ratios. Weights are random, which does not change
the times.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.distributed import create_accelerator
from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.files import write_json
from mgcc_dist.data.batch import Batch
from mgcc_dist.data.loader import StreamOffsets
from mgcc_dist.diffusion import autoencoder, denoiser, latents
from mgcc_dist.diffusion.denoiser import DenoiserLoss
from mgcc_dist.diffusion.latents import LatentBatch
from mgcc_dist.diffusion.stages import open_images
from mgcc_dist.ldm import LdmConfig
from mgcc_dist.train.schedules import Progress


class OnTheFly(nn.Module):
    """Encode images [B,1,H,W], then compute the denoiser's loss."""

    def __init__(self, loss: DenoiserLoss, vae: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.vae: Any = vae

    def forward(self, batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            posterior = self.vae.encode(batch.images).latent_dist
        classes = torch.zeros(len(batch.keys), dtype=torch.int64, device=batch.images.device)
        mask = torch.zeros_like(posterior.mean[:, :1])
        moments = LatentBatch(posterior.mean, posterior.logvar, classes, batch.offsets, batch.keys, mask)
        return self.loss(moments, progress)


def seconds_per_step(module: nn.Module, batches: Iterator, optimizer: torch.optim.Optimizer, steps: int) -> float:
    device = next(module.parameters()).device
    for step in range(steps + 1):
        if step == 1:  # the workers run, memory is allocated
            synchronize(device)
            started = time.perf_counter()
        batch, _ = next(batches)
        module(batch.to(device), Progress(step, steps, epoch=0.0, images=0, seed=0))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    synchronize(device)
    return (time.perf_counter() - started) / steps


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="shard folder of real images (default: phantom data)")
    parser.add_argument("--preset", default="busi_small", help="for networks, image size and batch")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps per round, each")
    options = parser.parse_args()

    data = ["--data.shards", options.shards] if options.shards else ["--data.phantom", "60", "--data.split", "null"]
    config = parse(LdmConfig, ["--preset", options.preset, *data], CONFIGS / "ldm")
    accelerator = create_accelerator()
    with tempfile.TemporaryDirectory() as scratch:
        images = open_images(config.data, Path(scratch), accelerator)
        vae = autoencoder.build(config.autoencoder, images.size).requires_grad_(False).eval().to(accelerator.device)
        started = time.perf_counter()
        stored = latents.encode(vae, "random", images, config.autoencoder.batch, Path(scratch) / "latents", accelerator)
        encoding = time.perf_counter() - started
        loss = denoiser.build_loss(config.denoiser, stored).to(accelerator.device)
        optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-5)
        pairs = []
        for _ in range(options.rounds):
            pixels = images.train_loader(config.denoiser.batch, 0, accelerator).batches(StreamOffsets())
            slow = seconds_per_step(OnTheFly(loss, vae), pixels, optimizer, options.steps)
            pixels.close()
            moments = stored.train_loader(config.denoiser.batch, 0, accelerator).batches(StreamOffsets())
            pairs.append((slow, seconds_per_step(loss, moments, optimizer, options.steps)))
            moments.close()
    ratios = sorted(slow / fast for slow, fast in pairs)
    settings = {
        "preset": options.preset,
        "image_size": images.size,
        "batch": config.denoiser.batch,
        "threads": torch.get_num_threads(),
    }
    row = {
        "pixels_seconds_per_step": round(statistics.median(slow for slow, _ in pairs), 4),
        "latents_seconds_per_step": round(statistics.median(fast for _, fast in pairs), 4),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_lowest_highest": [round(ratios[0], 2), round(ratios[-1], 2)],
        "seconds_to_encode_once": round(encoding, 1),
        "images_encoded": len(stored.train) + len(stored.val),
    }
    write_json(options.out, {**benchmark_header("benchmarks.latents"), **settings, "rows": {options.preset: row}})
    print(f"latents: {row} -> {options.out}")


if __name__ == "__main__":
    main()
