"""Batches of labeled and unlabeled images, for any number of ranks and workers.

How the samples are divided. There are two streams, 0 labeled and 1 unlabeled. A stream over N samples is the endless
concatenation of its epochs, each a permutation of its own: place p of the stream is sample

    permutation(seed, stream, epoch = p // N)[p % N].

A step takes the next `world * batch` places of each stream, and rank r has the r-th run of `batch` places of these. So

- every batch is full, and all ranks have the same number of batches;
- over N places each sample comes exactly once, whatever the number of ranks; an epoch may end within a batch;
- the smaller stream is cycled beside the larger;
- nothing depends on shards or workers, and all that a resumed run needs is its Position: the places consumed by all
  ranks together. On another number of ranks it goes on in the same order, divided otherwise.

The augmentation of place p of a stream is a pure function of (seed, stream, p).
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sized
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.augment import MIRROR, draw_symmetry, symmetry
from mgcc_dist.data.records import Sample
from mgcc_dist.data.sources import Resized, Source
from mgcc_dist.data.workers import load_in_order

LABELED, UNLABELED = 0, 1
KEPT_BYTES = 256 << 20  # decoded samples kept by each process of each stream: 2048 of 256x256 with their masks

Loaded = TypeVar("Loaded")
Augment = bool | Literal["mirror"]


@dataclass
class Batch:
    """L labeled images, then U unlabeled ones.

    images: float32 [L+U,1,S,S] in [-1,1]. masks: float32 [L,1,S,S] of 0 and 1. positions: int64 [L+U] on the CPU, each
    sample's place in its stream, which no other rank has. keys: those of the samples.
    """

    images: Tensor
    masks: Tensor
    positions: Tensor
    keys: list[str]

    @property
    def labeled(self) -> int:
        return self.masks.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """Images and masks on `device`; positions stay, because random generators are seeded with them."""
        images = self.images.to(device, non_blocking=non_blocking)
        return replace(self, images=images, masks=self.masks.to(device, non_blocking=non_blocking))


@dataclass
class ByteBatch:
    """A Batch as it is loaded, a quarter of its size on the way from worker to device.

    images: uint8 [L+U,1,S,S]. masks: bool [L,1,S,S]. positions, keys: as in Batch.
    """

    images: Tensor
    masks: Tensor
    positions: Tensor
    keys: list[str]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The Batch on `device`, whose pixels become floating point there; positions stay on the CPU."""
        images = scaled(self.images.to(device, non_blocking=non_blocking))
        masks = self.masks.to(device, non_blocking=non_blocking).float()
        return Batch(images, masks, self.positions, self.keys)

    def pin_memory(self) -> "ByteBatch":
        return replace(self, images=self.images.pin_memory(), masks=self.masks.pin_memory())


def scaled(pixels: Tensor) -> Tensor:
    """Grey values uint8 as float32 in [-1,1], which is what every network of the package sees."""
    return pixels.float().div_(127.5).sub_(1)


@dataclass(frozen=True)
class Position:
    """How many places of each stream all ranks together have consumed."""

    labeled: int = 0
    unlabeled: int = 0


@lru_cache(maxsize=8)
def permutation(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
    """Order int64 [size] of an epoch of a stream."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream, epoch))))
    return generator.permutation(size)


class Streams(ABC, Generic[Loaded]):
    """Endless training batches of one rank; see the module's text for who gets what.

    Args:
        sizes, batches: samples of the labeled and of the unlabeled stream, and how many a rank and step; 0 for none.
        workers: processes that load ahead; 0 loads in this process. Does not change the batches.
        augment: rotate and flip; "mirror" only exchanges left and right, for what must learn which way is up.
    """

    def __init__(
        self,
        sizes: tuple[int, int],
        batches: tuple[int, int],
        seed: int,
        rank: int,
        world: int,
        workers: int,
        augment: Augment,
    ) -> None:
        self.sizes = sizes
        self.batch_labeled, self.batch_unlabeled = batches
        self.seed = seed
        self.rank = rank
        self.world = world
        self.workers = workers
        self.augment = augment

    def batches(self, start: Position) -> Generator[tuple[Loaded, Position], None, None]:
        """Endless batches from `start` on, each with the Position after it.

        Closing the iterator ends its worker processes.

        Raises:
            UserError: a record can't be read, or a record of the labeled stream has no mask.
        """
        with closing(load_in_order(partial(self._load, start), itertools.count(), self.workers)) as batches:
            for steps, batch in enumerate(batches, start=1):
                yield batch, self._after(start, steps)

    def epoch_of(self, position: Position) -> float:
        """Epochs consumed of the labeled stream; of the unlabeled one where there is no other."""
        consumed = position.labeled if self.sizes[LABELED] else position.unlabeled
        return consumed / self._leading()[0]

    def steps_for(self, epochs: float) -> int:
        """Steps after which `epochs` epochs of that stream are consumed."""
        samples, batch = self._leading()
        return math.ceil(Fraction(str(epochs)) * samples / (batch * self.world))  # exact: 0.07 * 100 is 7, not more

    @abstractmethod
    def load(self, labeled: "list[Place]", unlabeled: "list[Place]") -> Loaded:
        """This rank's batch of a step, made of the samples at these places of the two streams."""

    def _leading(self) -> tuple[int, int]:
        """Size and batch of the stream that epochs are counted in."""
        stream = LABELED if self.sizes[LABELED] else UNLABELED
        return self.sizes[stream], (self.batch_labeled, self.batch_unlabeled)[stream]

    def _after(self, start: Position, steps: int) -> Position:
        return Position(
            start.labeled + steps * self.world * self.batch_labeled,
            start.unlabeled + steps * self.world * self.batch_unlabeled,
        )

    def _load(self, start: Position, step: int) -> Loaded:
        """This rank's batch of the `step`-th step after `start`."""
        begin = self._after(start, step)
        return self.load(
            self._places(LABELED, begin.labeled, self.batch_labeled),
            self._places(UNLABELED, begin.unlabeled, self.batch_unlabeled),
        )

    def _places(self, stream: int, begin: int, batch: int) -> "list[Place]":
        size, places = self.sizes[stream], []
        for place in range(begin + self.rank * batch, begin + (self.rank + 1) * batch):
            epoch, within = divmod(place, size)
            index = int(permutation(self.seed, stream, epoch, size)[within])
            which = draw_symmetry(self.seed, stream, place) if self.augment else 0
            places.append(Place(place, index, which & MIRROR if self.augment == "mirror" else which))
        return places


@dataclass(frozen=True)
class Place:
    """A place of a stream, the number of the sample there, and the symmetry that it is shown under."""

    place: int
    index: int
    which: int


class StreamLoader(Streams[ByteBatch]):
    """Endless training batches of labeled and unlabeled images.

    Args:
        labeled, unlabeled: the streams; None where there is none, and then its batch is 0.
        batch_labeled, batch_unlabeled: samples of each stream a rank and step.
        image_size: images of another size are stretched to `image_size` x `image_size`.
        workers, augment: as in Streams. A process decodes a sample once, and again only where KEPT_BYTES are full.

    Raises:
        UserError: no stream, an empty one, or one without a batch size or the other way round.
    """

    def __init__(
        self,
        labeled: Source | None,
        unlabeled: Source | None,
        batch_labeled: int,
        batch_unlabeled: int,
        image_size: int,
        seed: int,
        rank: int,
        world: int,
        workers: int,
        augment: Augment,
    ) -> None:
        check_stream("labeled", labeled, batch_labeled)
        check_stream("unlabeled", unlabeled, batch_unlabeled)
        if labeled is None and unlabeled is None:
            raise UserError("loader: there are neither labeled nor unlabeled images to train on")
        sizes = (len(labeled) if labeled else 0, len(unlabeled) if unlabeled else 0)
        super().__init__(sizes, (batch_labeled, batch_unlabeled), seed, rank, world, workers, augment)
        self.image_size = image_size
        self.labeled = Resized(labeled, image_size, KEPT_BYTES) if labeled else None
        self.unlabeled = Resized(unlabeled, image_size, KEPT_BYTES) if unlabeled else None

    def load(self, labeled: list[Place], unlabeled: list[Place]) -> ByteBatch:
        chosen = []
        for at in labeled:
            assert self.labeled is not None
            sample = self.labeled.read(at.index)
            if sample.mask is None:
                raise UserError(
                    f"loader: record {sample.key!r} has no mask but stands among the labeled ones; "
                    "mark it as unlabeled in the split, or write its shards again with its mask"
                )
            chosen.append(_Chosen(sample, at.place, at.which, labeled=True))
        for at in unlabeled:
            assert self.unlabeled is not None
            chosen.append(_Chosen(self.unlabeled.read(at.index), at.place, at.which, labeled=False))
        return _assemble(chosen, self.image_size)


class EvalLoader:
    """Every sample of `source` exactly once over all ranks, as it is; rank r has samples r, r + world, ...

    Raises:
        UserError: `source` is empty.
    """

    def __init__(self, source: Source, batch: int, image_size: int, rank: int, world: int, workers: int) -> None:
        check_stream("evaluation", source, batch)
        self.source = Resized(source, image_size)
        self.batch = batch
        self.image_size = image_size
        self.rank = rank
        self.world = world
        self.workers = workers

    def batches(self) -> Generator[ByteBatch, None, None]:
        """Batches of at most `batch` samples, whose positions are their numbers in the source.

        Where some samples have no mask, the labeled ones of a batch come first.

        Raises:
            UserError: a record can't be read.
        """
        count = math.ceil(len(range(self.rank, len(self.source), self.world)) / self.batch)
        yield from load_in_order(self._load, range(count), min(self.workers, count))

    def _load(self, number: int) -> ByteBatch:
        mine = range(self.rank, len(self.source), self.world)
        samples = [(place, self.source.read(place)) for place in mine[number * self.batch : (number + 1) * self.batch]]
        chosen = [_Chosen(sample, place, 0, labeled=sample.mask is not None) for place, sample in samples]
        return _assemble(sorted(chosen, key=lambda one: not one.labeled), self.image_size)


@dataclass(frozen=True)
class _Chosen:
    """A sample for a batch: its place, its symmetry, and whether its mask is shown."""

    sample: Sample
    place: int
    which: int
    labeled: bool


def check_stream(name: str, source: Sized | None, batch: int) -> None:
    """Raise UserError where a stream is empty, or has no batch size or the other way round."""
    if source is not None and len(source) == 0:
        raise UserError(f"loader: there are no {name} images; is the split or the shard folder empty?")
    if (source is not None) != (batch > 0):
        has = "no source" if source is None else f"{len(source)} images"
        raise UserError(f"loader: the batch size of the {name} stream is {batch} but it has {has}")


def _assemble(chosen: "list[_Chosen]", size: int) -> ByteBatch:
    """The batch of `chosen`, whose labeled samples come first."""
    labeled = sum(one.labeled for one in chosen)
    images = np.empty((len(chosen), 1, size, size), np.uint8)
    masks = np.empty((labeled, 1, size, size), np.bool_)
    for row, one in enumerate(chosen):
        images[row, 0] = symmetry(one.sample.image, one.which)
        if one.labeled:
            assert one.sample.mask is not None
            masks[row, 0] = symmetry(one.sample.mask, one.which) > 0
    places = torch.tensor([one.place for one in chosen], dtype=torch.int64)
    return ByteBatch(torch.from_numpy(images), torch.from_numpy(masks), places, [one.sample.key for one in chosen])
