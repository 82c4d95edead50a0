"""The images' latents, encoded once: what the denoiser is trained on, instead of pixels at every step.

A latent is the posterior q(z|x) of the frozen autoencoder: mean and log-variance of every element, from which each step
draws its own z. A record is `{key}.safetensors`, "mean" and "logvar" float16 [V,C,h,w] with V = 2 views, the image
and its mirror image, where mirrored images are shown (else V = 1), and `{key}.json` with the image's class and group.
The folder `training/` is of the images that are learned, `held_out/` of the others, each filled by all ranks together
(`data/shard_writer.py`). Training reads them in the order of the images (`data/loader.py`): the same sample, view and
index, so the same noise.
"""

import hashlib
import json
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from mgcc_dist.data.augment import MIRROR, symmetry
from mgcc_dist.data.images import resize_image
from mgcc_dist.data.loader import Place, Streams, check_stream, scaled
from mgcc_dist.data.records import (
    CorruptRecord,
    OpenShard,
    RecordFolder,
    RecordInfo,
    read_meta,
    read_verified,
    write_index,
    write_records,
)
from mgcc_dist.data.shard_writer import fill, is_filled
from mgcc_dist.data.sources import Source, Subset
from mgcc_dist.diffusion.images import Images

PER_SHARD = 256


@dataclass(frozen=True, eq=False)
class Latent:
    """One image's posterior: `mean` and `logvar` float16 [V,C,h,w], view 1 that of the mirrored image."""

    key: str
    mean: Tensor
    logvar: Tensor
    category: str


@dataclass
class LatentBatch:
    """Posteriors `mean` and `logvar`, float16 [B,C,h,w].

    classes: int64 [B], numbers of the training images' classes in the order of their names; their count for a class
    that training lacks. positions: int64 [B] on the CPU, each sample's place in its stream, which no other rank has.
    """

    mean: Tensor
    logvar: Tensor
    classes: Tensor
    positions: Tensor
    keys: list[str]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "LatentBatch":
        """All but the positions on `device`, because random generators are seeded with these."""
        moved = (each.to(device, non_blocking=non_blocking) for each in (self.mean, self.logvar, self.classes))
        mean, logvar, classes = moved
        return replace(self, mean=mean, logvar=logvar, classes=classes)

    def pin_memory(self) -> "LatentBatch":
        mean, logvar, classes = (each.pin_memory() for each in (self.mean, self.logvar, self.classes))
        return replace(self, mean=mean, logvar=logvar, classes=classes)

    def sample(self, draws: list[torch.Generator]) -> Tensor:
        """z ~ q(z|x), float32 [B,C,h,w], each from its own generator."""
        return DiagonalGaussianDistribution(torch.cat([self.mean, self.logvar], dim=1).float()).sample(draws)


class LatentFolder(RecordFolder):
    """A whole folder of latents."""

    FORMAT = "mgcc-dist latents"

    def read(self, i: int) -> Latent:
        """Raises UserError where the record can't be read, or has another sha256 than was written with it."""
        return self.read_as(i, _decode)


class LatentLoader(Streams[LatentBatch]):
    """Endless training batches of latents, in the order of the images' unlabeled stream.

    Raises:
        UserError: there are no latents.
    """

    def __init__(self, latents: LatentFolder, batch: int, seed: int, rank: int, world: int, workers: int) -> None:
        check_stream("training", latents, batch)
        mirror = latents.index["request"]["mirror"]
        super().__init__((0, len(latents)), (0, batch), seed, rank, world, workers, "mirror" if mirror else False)
        self.latents = latents

    def load(self, labeled: list[Place], unlabeled: list[Place]) -> LatentBatch:
        chosen = [(at.place, at.index, int(at.which == MIRROR)) for at in unlabeled]
        return _collate(self.latents, list(self.latents.index["classes"]), chosen)


@dataclass(frozen=True)
class Latents:
    """Training and held-out latents, as loaders."""

    learned: LatentFolder
    unseen: LatentFolder
    workers: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C,h,w] of a latent."""
        channels, height, width = self.learned.index["shape"]
        return channels, height, width

    @property
    def classes(self) -> dict[str, int]:
        """How many training images there are of each class, by name."""
        return self.learned.index["classes"]

    @property
    def autoencoder(self) -> str:
        """sha256 of the weights of the autoencoder that encoded them."""
        return self.learned.index["request"]["autoencoder"]

    def training(self, batch: int, seed: int, accelerator: Accelerator) -> LatentLoader:
        """Endless batches of the training images, some of them mirrored if that is how they are shown."""
        rank, world = accelerator.process_index, accelerator.num_processes
        return LatentLoader(self.learned, batch, seed, rank, world, self.workers)

    def held_out(self, batch: int, accelerator: Accelerator) -> Generator[LatentBatch, None, None]:
        """Every held-out image once over all ranks; positions are its numbers."""
        mine = range(accelerator.process_index, len(self.unseen), accelerator.num_processes)
        for start in range(0, len(mine), batch):
            chosen = [(i, i, 0) for i in mine[start : start + batch]]
            yield _collate(self.unseen, list(self.classes), chosen)


def encode(
    vae: AutoencoderKL, vae_sha256: str, images: Images, batch: int, folder: Path, accelerator: Accelerator
) -> Latents:
    """The latents of `images` in `folder`; encodes what is missing there. Collective.

    Raises:
        UserError: `folder` holds latents of another autoencoder or of other images.
    """
    parts = {"training": (images.learned, images.mirror), "held_out": (images.unseen, False)}
    for name, (source, mirror) in parts.items():
        request = _request(vae_sha256, images, source, mirror)
        if is_filled(folder / name, request, "latents"):
            accelerator.print(f"latents: {folder / name / 'index.json'} is there already")
        else:
            _encode(vae.to(accelerator.device), images, source, batch, folder / name, request, accelerator)
    learned, unseen = (LatentFolder.open(folder / name, verify=accelerator.is_local_main_process) for name in parts)
    return Latents(learned, unseen, images.workers)


def _encode(
    vae: AutoencoderKL,
    images: Images,
    source: Source,
    batch: int,
    folder: Path,
    request: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Fill one of the two folders."""
    shape = (vae.config.latent_channels, *[images.size // 2 ** (len(vae.config.block_out_channels) - 1)] * 2)
    shards = [
        (f"latents-{start:06d}.tar", range(start, min(start + PER_SHARD, len(source))))
        for start in range(0, len(source), PER_SHARD)
    ]
    fill(
        folder,
        request,
        shards,
        partial(_make, vae, source, images.size, request["mirror"], batch),
        lambda path, records: write_records(path, records),
        lambda entries: write_index(
            folder, images.data.dataset, entries, LatentFolder.FORMAT, shape=shape, request=request
        ),
        f"encoding {folder.name.replace('_', ' ')} images",
        accelerator,
    )


@torch.no_grad()
def _make(
    vae: AutoencoderKL, source: Source, size: int, mirror: bool, batch: int, items: range, bar: tqdm
) -> list[dict[str, Any]]:
    """The records of the images `items`."""
    records = []
    for start in range(0, len(items), batch):
        samples = [source.read(i) for i in items[start : start + batch]]
        squares = np.stack([resize_image(sample.image, size, size) for sample in samples])
        views = [_posterior(vae, squares)]
        if mirror:
            views.append(_posterior(vae, np.stack([symmetry(square, MIRROR) for square in squares])))
        moments = torch.stack(views, dim=1)  # [B,V,2C,h,w]
        for sample, (mean, logvar) in zip(samples, (each.chunk(2, dim=1) for each in moments), strict=True):
            content = save({"mean": mean.contiguous(), "logvar": logvar.contiguous()})
            meta = {
                "class": sample.meta["class"],
                "group": sample.meta["group"],
                "image_sha256": sample.meta["sha256"],
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            json_ = json.dumps(meta, sort_keys=True).encode()
            records.append({"__key__": sample.key, "safetensors": content, "json": json_})
            bar.update()
    return records


def _posterior(vae: AutoencoderKL, squares: np.ndarray) -> Tensor:
    """Mean and log-variance [B,2C,h,w], float16 on the CPU, of images uint8 [B,S,S]."""
    posterior = vae.encode(scaled(torch.from_numpy(squares).to(vae.device)[:, None])).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1).half().cpu()


def _request(vae_sha256: str, images: Images, source: Subset, mirror: bool) -> dict[str, Any]:
    """All that the latents depend on."""
    shards = [shard["sha256"] for shard in images.data.index["shards"]]
    chosen = json.dumps([shards, source.indices])
    return {
        "autoencoder": vae_sha256,
        "images": hashlib.sha256(chosen.encode()).hexdigest(),
        "size": images.size,
        "mirror": mirror,
    }


def _decode(shard: OpenShard, info: RecordInfo) -> Latent:
    member = f"{info.key}.safetensors"
    tensors = load(read_verified(shard, member, read_meta(shard, info).get("sha256")))
    if tensors.keys() != {"mean", "logvar"}:
        raise CorruptRecord(f"{member} holds {', '.join(sorted(tensors))}, not mean and logvar")
    return Latent(info.key, tensors["mean"], tensors["logvar"], info.category)


def _collate(latents: LatentFolder, classes: list[str], chosen: list[tuple[int, int, int]]) -> LatentBatch:
    """The batch of samples (position, number, view)."""
    numbers = {name: number for number, name in enumerate(classes)}
    read = [latents.read(index) for _, index, _ in chosen]
    views = [view for _, _, view in chosen]
    return LatentBatch(
        mean=torch.stack([latent.mean[view] for latent, view in zip(read, views, strict=True)]),
        logvar=torch.stack([latent.logvar[view] for latent, view in zip(read, views, strict=True)]),
        classes=torch.tensor([numbers.get(latent.category, len(numbers)) for latent in read]),
        positions=torch.tensor([position for position, _, _ in chosen]),
        keys=[latent.key for latent in read],
    )
