"""Latents of the images, encoded once. The denoiser trains on these instead of encoding pixels at every step.

A latent is stored as the posterior q(z|x) of the frozen autoencoder, i.e. mean and log-variance of every element. Each
training step samples its own z from it. A record is `{key}.safetensors` with "mean" and "logvar", float16 [V,C,h,w],
and `{key}.json` with the image's class and group. For a denoiser with `masks`, an image whose mask it may see also has
"mask", float16 [V,1,h,w] (`condition.py`). V is the number of views: 2 with `data.mirror` (the image and its
mirror image), else 1. The folder `train/` holds the training images, `val/` the validation images. Each is
written by all ranks together (`data/shard_writer.py`). Training reads the latents in the same order as the images
(`data/loader.py`): the same sample, view and index, hence the same noise.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Container, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import Subset

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.finite import require_finite
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.data.augment import MIRROR, symmetry
from mgcc_dist.data.batch import normalize
from mgcc_dist.data.datasets import SampleDataset
from mgcc_dist.data.images import resize_image, resize_mask
from mgcc_dist.data.loader import Augment, Ranks, Stream, TrainLoader
from mgcc_dist.data.order import StreamItem, evaluation_batches
from mgcc_dist.data.records import RecordFolder, read_meta, write_index, write_records
from mgcc_dist.data.sample import RecordInfo, Sample
from mgcc_dist.data.shard_writer import is_complete, write_shards_distributed
from mgcc_dist.data.storage import CorruptRecord, OpenShard
from mgcc_dist.diffusion.autoencoder import Autoencoder, latent_shape
from mgcc_dist.diffusion.condition import shrink_masks
from mgcc_dist.diffusion.config import Masks
from mgcc_dist.diffusion.images import ImageData

logger = logging.getLogger(__name__)

PER_SHARD = 256
PARTS = {"train": "training", "val": "held_out"}
"""subfolders, and what version 0.1 called them"""


@dataclass(frozen=True, eq=False)
class Latent:
    """Posterior of one image: `mean` and `logvar` float16 [V,C,h,w]; view 1 is the mirrored image.

    `mask` is float16 [V,1,h,w], of -1 to 1; 0 if it is unknown.
    """

    key: str
    mean: Tensor
    logvar: Tensor
    mask: Tensor
    category: str


@dataclass
class LatentBatch:
    """A batch of posteriors: `mean` and `logvar` float16 [B,C,h,w].

    classes: int64 [B], class labels, numbered by the sorted names of the training classes; a class that is not in the
    training set gets the label `len(classes)`. offsets: int64 [B] on the CPU, each sample's offset in its stream,
    unique over all ranks. mask: float16 [B,1,h,w], of -1 to 1; 0 where it is unknown.
    """

    mean: Tensor
    logvar: Tensor
    classes: Tensor
    offsets: Tensor
    keys: list[str]
    mask: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "LatentBatch":
        """Move everything but `offsets`, which seed CPU generators, to `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "LatentBatch":
        return self._map(Tensor.pin_memory)

    def sample(self, generators: list[torch.Generator]) -> Tensor:
        """Sample z ~ q(z|x), float32 [B,C,h,w], with one generator per image."""
        return DiagonalGaussianDistribution(torch.cat([self.mean.float(), self.logvar.float()], dim=1)).sample(
            generators
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> "LatentBatch":
        mean, logvar, classes, mask = map(change, (self.mean, self.logvar, self.classes, self.mask))
        return replace(self, mean=mean, logvar=logvar, classes=classes, mask=mask)


class LatentFolder(RecordFolder[Latent]):
    """Map-style dataset over a complete folder of latents."""

    FORMAT = "mgcc-dist latents"

    def decode(self, shard: OpenShard, info: RecordInfo) -> Latent:
        member = f"{info.key}.safetensors"
        tensors = load(shard.read_verified(member, read_meta(shard, info).get("sha256")))
        if not {"mean", "logvar"} <= tensors.keys() <= {"mean", "logvar", "mask"}:
            raise CorruptRecord(f"{member} holds {', '.join(sorted(tensors))} instead of mean and logvar")
        mask = tensors.get("mask", torch.zeros_like(tensors["mean"][:, :1]))
        return Latent(info.key, tensors["mean"], tensors["logvar"], mask, info.category)


class LatentLoader(TrainLoader[LatentBatch]):
    """Endless loader of training latents, in the same order as the images' unlabeled stream.

    Raises:
        UserError: the folder is empty.
    """

    def __init__(self, latents: LatentFolder, batch: int, seed: int, ranks: Ranks, workers: int = 0) -> None:
        augment: Augment = "mirror" if latents.index["request"]["mirror"] else "none"
        super().__init__(None, Stream(latents, batch), seed=seed, ranks=ranks, workers=workers, augment=augment)
        self.latents = latents

    def load(
        self, labeled: list[StreamItem], unlabeled: list[StreamItem], synthetic: Sequence[StreamItem] = ()
    ) -> LatentBatch:
        chosen = [(item.offset, item.index, int(item.symmetry == MIRROR)) for item in unlabeled]
        return _collate(self.latents, list(self.latents.index["classes"]), chosen)


@dataclass(frozen=True)
class LatentData:
    """Training and validation latents, and loaders for them."""

    train: LatentFolder
    val: LatentFolder
    workers: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape [C,h,w] of a latent."""
        channels, height, width = self.train.index["shape"]
        return channels, height, width

    @property
    def classes(self) -> dict[str, int]:
        """Number of training images per class name."""
        return self.train.index["classes"]

    @property
    def autoencoder(self) -> str:
        """sha256 of the weights of the autoencoder that encoded the images."""
        return self.train.index["request"]["autoencoder"]

    def train_loader(self, batch: int, seed: int, accelerator: Accelerator) -> LatentLoader:
        """Return an endless loader of shuffled training latents, mirrored at random with `data.mirror`."""
        return LatentLoader(self.train, batch, seed, Ranks.of(accelerator), self.workers)

    def val_batches(self, batch: int, accelerator: Accelerator) -> Generator[LatentBatch, None, None]:
        """Yield the validation latents, divided over the ranks; `offsets` are indices into `val`.

        All ranks have the same number of batches (`evaluation_batches`).
        """
        rank, world = accelerator.process_index, accelerator.num_processes
        for indices in evaluation_batches(len(self.val), batch, rank, world, in_step=True):
            yield _collate(self.val, list(self.classes), [(i, i, 0) for i in indices])


def encode(
    vae: Autoencoder,
    vae_sha256: str,
    images: ImageData,
    batch: int,
    folder: Path,
    accelerator: Accelerator,
    masks: Masks = "none",
) -> LatentData:
    """Return the latents of `images` in `folder`, encoding those that do not exist yet. Collective.

    With `masks`, training latents have the masks of those images, and validation latents all masks that exist.

    Raises:
        UserError: `folder` holds latents of a different autoencoder or of different images.
    """
    _rename_parts(folder, accelerator)
    parts = {"train": (images.train, images.mirror), "val": (images.val, False)}
    for name, (dataset, mirror) in parts.items():
        request = _request(vae_sha256, images, dataset, mirror, masks)
        if not is_complete(folder / name, request, "latents"):
            _encode(vae.to(accelerator.device), images, dataset, batch, folder / name, request, accelerator)
    train, val = (LatentFolder.open(folder / name, verify=accelerator.is_local_main_process) for name in parts)
    return LatentData(train, val, images.workers)


def _rename_parts(folder: Path, accelerator: Accelerator) -> None:
    """Give the parts that version 0.1 wrote their present names. Collective."""
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            for name, old in PARTS.items():
                if (folder / old).is_dir() and not (folder / name).exists():
                    (folder / old).rename(folder / name)


def _encode(
    vae: Autoencoder,
    images: ImageData,
    dataset: SampleDataset,
    batch: int,
    folder: Path,
    request: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Write one of the two folders."""
    masked: set[str] = set()
    if request.get("masks"):
        of_train = {images.shards.records[index].key for index in images.masked(request["masks"]).indices}
        masked = of_train if dataset is images.train else {record.key for record in images.shards.records}
    shards = [
        (f"latents-{start:06d}.tar", range(start, min(start + PER_SHARD, len(dataset))))
        for start in range(0, len(dataset), PER_SHARD)
    ]
    write_shards_distributed(
        folder,
        request,
        shards,
        partial(_encode_records, vae, dataset, masked, images.size, request["mirror"], batch),
        write_records,
        lambda entries: write_index(
            folder, images.shards.dataset, entries, LatentFolder.FORMAT, shape=latent_shape(vae), request=request
        ),
        f"encoding {'training' if dataset is images.train else 'validation'} images",
        accelerator,
    )


@torch.no_grad()
def _encode_records(
    vae: Autoencoder,
    dataset: SampleDataset,
    masked: Container[str],
    size: int,
    mirror: bool,
    batch: int,
    items: range,
    bar: ProgressBar,
) -> list[dict[str, Any]]:
    """Return the records of the images with indices `items`, with their masks if their keys are in `masked`."""
    records = []
    for start in range(0, len(items), batch):
        samples = [dataset[i] for i in items[start : start + batch]]
        squares = np.stack([resize_image(sample.image, size, size) for sample in samples])
        views = [_posterior(vae, squares)]
        if mirror:
            views.append(_posterior(vae, np.stack([symmetry(square, MIRROR) for square in squares])))
        moments = torch.stack(views, dim=1)  # [B,V,2C,h,w]
        keys = [f"image {sample.key!r}" for sample in samples]
        require_finite(moments, "encoding", keys, "Train the autoencoder again with a lower learning rate.")
        for sample, image_moments in zip(samples, moments, strict=True):
            mean, logvar = image_moments.chunk(2, dim=1)
            tensors = {"mean": mean.contiguous(), "logvar": logvar.contiguous()}
            if sample.mask is not None and sample.key in masked:
                square = resize_mask(sample.mask, size, size)
                seen = [square, symmetry(square, MIRROR)] if mirror else [square]
                tensors["mask"] = shrink_masks(torch.from_numpy(np.stack(seen)), mean.shape[-1]).half()
            content = save(tensors)
            meta = {
                "class": sample.meta["class"],
                "group": sample.meta["group"],
                "image_sha256": sample.meta["sha256"],
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            encoded_meta = json.dumps(meta, sort_keys=True).encode()
            records.append({"__key__": sample.key, "safetensors": content, "json": encoded_meta})
            bar.update()
    return records


def _posterior(vae: Autoencoder, squares: np.ndarray) -> Tensor:
    """Return mean and log-variance [B,2C,h,w], float16 on the CPU, of images uint8 [B,S,S]."""
    posterior = vae.encode(normalize(torch.from_numpy(squares).to(vae.device)[:, None])).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1).half().cpu()


def _request(vae_sha256: str, images: ImageData, dataset: Subset[Sample], mirror: bool, masks: Masks) -> dict[str, Any]:
    """Return everything that the latents depend on."""
    shards = [shard["sha256"] for shard in images.shards.index["shards"]]
    selection = json.dumps([shards, list(dataset.indices)])
    return {
        "autoencoder": vae_sha256,
        "images": hashlib.sha256(selection.encode()).hexdigest(),
        "size": images.size,
        "mirror": mirror,
        **({"masks": masks} if masks != "none" else {}),
    }


def _collate(latents: LatentFolder, classes: list[str], chosen: list[tuple[int, int, int]]) -> LatentBatch:
    """Return the batch of the samples `chosen`, each (stream offset, index into `latents`, view)."""
    labels = {name: label for label, name in enumerate(classes)}
    read = [latents[index] for _, index, _ in chosen]
    views = [view for _, _, view in chosen]
    return LatentBatch(
        mean=torch.stack([latent.mean[view] for latent, view in zip(read, views, strict=True)]),
        logvar=torch.stack([latent.logvar[view] for latent, view in zip(read, views, strict=True)]),
        classes=torch.tensor([labels.get(latent.category, len(labels)) for latent in read]),
        offsets=torch.tensor([offset for offset, _, _ in chosen]),
        keys=[latent.key for latent in read],
        mask=torch.stack([latent.mask[view] for latent, view in zip(read, views, strict=True)]),
    )
