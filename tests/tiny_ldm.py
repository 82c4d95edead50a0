"""A tiny autoencoder and denoiser: 16x16 images, 4x4 latents of two channels."""

import torch

from mgcc_dist.data.batch import Batch
from mgcc_dist.diffusion.config import KLAutoencoderConfig, SamplingConfig, UNetDenoiserConfig
from mgcc_dist.diffusion.latents import LatentBatch
from mgcc_dist.train.config import LoopConfig
from mgcc_dist.train.schedules import Progress

LOOP = LoopConfig(steps=1)
AUTOENCODER = KLAutoencoderConfig(loop=LOOP, channels=(4, 4, 8), layers=1, latent_channels=2, norm_groups=4)
DENOISER = UNetDenoiserConfig(
    loop=LOOP, channels=(8, 8), attention=(False, True), layers=1, norm_groups=4, head_channels=4
)
SHAPE = (2, 4, 4)
PROGRESS = Progress(0, 1, epoch=0.0, images=0, seed=7)


def batch_of(images: torch.Tensor, offsets: list[int]) -> Batch:
    size = images.shape[-1]
    return Batch(images, torch.zeros(0, 1, size, size), torch.tensor(offsets), [str(i) for i in offsets])


def latents_of(moments: torch.Tensor, offsets: list[int]) -> LatentBatch:
    """Return the batch of posteriors `moments` [B,4,4,4], i.e. mean and log-variance."""
    mean, logvar = moments.chunk(2, dim=1)
    classes = torch.tensor([offset % 3 for offset in offsets])
    mask = torch.zeros_like(mean[:, :1])
    return LatentBatch(mean, logvar, classes, torch.tensor(offsets), [str(i) for i in offsets], mask)


SAMPLING = SamplingConfig(count=7, steps=3, seed=5, per_shard=2, batch=2)
