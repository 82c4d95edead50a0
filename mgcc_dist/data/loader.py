"""Batches of labeled and unlabeled images, for any number of ranks and workers.

How samples are distributed. There are two streams, 0 labeled and 1 unlabeled. A stream over N samples is the endless
concatenation of its epochs, each with its own permutation. The sample at offset p of a stream is

    permutation(seed, stream, epoch = p // N)[p % N],    or, with a window of shards, another order (order.py).

A step takes the next `world * batch` offsets of each stream, and rank r gets the r-th block of `batch` of them. So

- every batch is full, and all ranks have the same number of batches;
- each sample comes exactly once in N consecutive offsets, for any number of ranks; an epoch may end within a batch;
- the smaller stream is cycled while the larger one is traversed;
- the order does not depend on shards or workers. To resume, a run needs only its StreamOffsets: the samples
  consumed by all ranks so far. On another number of ranks the order stays the same and only its distribution changes.

Labeled synthetic images are a third stream, 2. A batch with `batch_labeled` samples of stream 0 also has
`batch_synthetic` of stream 2, right after them: batch g of the labeled stream takes the offsets from
g * batch_synthetic on. So real images are seen as often as without synthetic ones, the share of synthetic images is the
same in every batch, and the offset of stream 0 is all that a resumed run needs.

The symmetry applied at offset p of a stream is a pure function of (seed, stream, p). The augmentation `ultrasound`
follows on the device, when a batch is moved there, and draws from torch's global generators: see train/loop.py.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.augment import MIRROR, draw_released_symmetry, draw_symmetry, symmetry
from mgcc_dist.data.batch import ByteBatch
from mgcc_dist.data.datasets import ResizedDataset, SampleDataset
from mgcc_dist.data.geometry import STRETCHED, Fit, fit_sample
from mgcc_dist.data.order import StreamItem, WindowedOrder, evaluation_batches, permutation, windowed_orders
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.workers import load_in_order

LABELED, UNLABELED, SYNTHETIC = 0, 1, 2
CACHE_BYTES = 256 << 20  # decoded samples cached per process and stream: 2048 of 256x256 with their masks

Loaded = TypeVar("Loaded")
Source_co = TypeVar("Source_co", bound=Sized, covariant=True)
Augment = Literal["none", "mirror", "symmetries", "released", "ultrasound"]


@dataclass(frozen=True)
class StreamOffsets:
    """Samples of each stream consumed so far, over all ranks."""

    labeled: int = 0
    unlabeled: int = 0


@dataclass(frozen=True)
class Stream(Generic[Source_co]):
    """A dataset that training cycles through, and how many of its samples each rank takes per step."""

    dataset: Source_co
    batch_size: int


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and how many there are."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Ranks":
        return cls(accelerator.process_index, accelerator.num_processes)


class TrainLoader(ABC, Generic[Loaded]):
    """Endless training batches for one rank; the module docstring says how samples are distributed.

    Args:
        labeled, unlabeled: the streams, at least one.
        synthetic: labeled synthetic images; they need a labeled stream.
        workers: processes that prefetch; 0 loads in this process. Does not change the batches.
        augment: "symmetries" and "released" rotate and flip; "mirror" flips only horizontally, for models that must
            keep images upright; "ultrasound" too, and then augments on the device.

    Raises:
        UserError: there is no stream, or one is empty.
    """

    def __init__(
        self,
        labeled: Stream[Sized] | None,
        unlabeled: Stream[Sized] | None,
        *,
        synthetic: Stream[Sized] | None = None,
        seed: int,
        ranks: Ranks,
        workers: int = 0,
        augment: Augment = "none",
    ) -> None:
        streams = {"labeled": labeled, "unlabeled": unlabeled, "labeled synthetic": synthetic}
        for name, stream in streams.items():
            if stream is not None:
                check_stream(name, stream)
        if labeled is None and unlabeled is None:
            raise UserError("loader: there are neither labeled nor unlabeled images to train on")
        self.sizes = tuple(len(stream.dataset) if stream else 0 for stream in streams.values())
        self.batch_labeled, self.batch_unlabeled, self.batch_synthetic = (
            stream.batch_size if stream else 0 for stream in streams.values()
        )
        self.seed = seed
        self.rank, self.world = ranks.rank, ranks.world
        self.workers = workers
        self.augment = augment
        self.windowed: Mapping[int, WindowedOrder] = {}

    @property
    def batch(self) -> int:
        """Samples of all streams per rank and step."""
        return self.batch_labeled + self.batch_synthetic + self.batch_unlabeled

    def batches(self, start: StreamOffsets) -> Generator[tuple[Loaded, StreamOffsets], None, None]:
        """Yield endless batches from `start`, each with the offsets after it.

        Closing the generator ends its worker processes.

        Raises:
            UserError: a record can't be read, or a record of the labeled stream has no mask.
        """
        with closing(load_in_order(partial(self._load_step, start), itertools.count(), self.workers)) as batches:
            for steps, batch in enumerate(batches, start=1):
                yield batch, self._advance(start, steps)

    def epoch_of(self, offsets: StreamOffsets) -> float:
        """Return the epochs consumed of the labeled stream, or of the unlabeled one if there are no labels."""
        return self.consumed(offsets) / self._epoch_stream()[0]

    def consumed(self, offsets: StreamOffsets) -> int:
        """Return the samples consumed of that stream, over all ranks."""
        return offsets.labeled if self.sizes[LABELED] else offsets.unlabeled

    def batches_for(self, epochs: float) -> int:
        """Return the batches, over all ranks, after which `epochs` epochs of that stream are consumed."""
        samples, batch = self._epoch_stream()
        return math.ceil(Fraction(str(epochs)) * samples / batch)  # exact: 0.07 * 100 is 7, not more

    @abstractmethod
    def load(
        self, labeled: list[StreamItem], unlabeled: list[StreamItem], synthetic: Sequence[StreamItem] = ()
    ) -> Loaded:
        """Load this rank's batch of one step."""

    def _epoch_stream(self) -> tuple[int, int]:
        """Return size and batch size of the stream that epochs are counted in."""
        stream = LABELED if self.sizes[LABELED] else UNLABELED
        return self.sizes[stream], (self.batch_labeled, self.batch_unlabeled)[stream]

    def _advance(self, start: StreamOffsets, steps: int) -> StreamOffsets:
        return StreamOffsets(
            start.labeled + steps * self.world * self.batch_labeled,
            start.unlabeled + steps * self.world * self.batch_unlabeled,
        )

    def _load_step(self, start: StreamOffsets, step: int) -> Loaded:
        """Load this rank's batch of the `step`-th step after `start`."""
        begin = self._advance(start, step)
        synthetic = begin.labeled // self.batch_labeled * self.batch_synthetic if self.batch_synthetic else 0
        return self.load(
            self._items(LABELED, begin.labeled, self.batch_labeled),
            self._items(UNLABELED, begin.unlabeled, self.batch_unlabeled),
            self._items(SYNTHETIC, synthetic, self.batch_synthetic),
        )

    def _items(self, stream: int, begin: int, batch: int) -> list[StreamItem]:
        size, items = self.sizes[stream], []
        for offset in range(begin + self.rank * batch, begin + (self.rank + 1) * batch):
            epoch, within_epoch = divmod(offset, size)
            windowed = self.windowed.get(stream)
            order = windowed(self.seed, stream, epoch) if windowed else permutation(self.seed, stream, epoch, size)
            index = int(order[within_epoch])
            items.append(StreamItem(offset, index, self._symmetry(stream, offset)))
        return items

    def _symmetry(self, stream: int, offset: int) -> int:
        if self.augment == "none":
            return 0
        if self.augment == "released":
            return draw_released_symmetry(self.seed, stream, offset)
        drawn = draw_symmetry(self.seed, stream, offset)
        return drawn if self.augment == "symmetries" else drawn & MIRROR


class ImageTrainLoader(TrainLoader[ByteBatch]):
    """Endless training batches of labeled and unlabeled images.

    Args:
        image_size: side of the square that images become.
        fit: how they become one (data/geometry.py).
        shard_window: read so many shards at a time (order.py); None: all in random order.
        others: as in TrainLoader. Each process decodes a sample once, until its cache (CACHE_BYTES) is full.
    """

    def __init__(
        self,
        labeled: Stream[SampleDataset] | None,
        unlabeled: Stream[SampleDataset] | None,
        *,
        synthetic: Stream[SampleDataset] | None = None,
        image_size: int,
        fit: Fit = "stretch",
        shard_window: int | None = None,
        seed: int,
        ranks: Ranks,
        workers: int = 0,
        augment: Augment = "none",
    ) -> None:
        super().__init__(
            labeled, unlabeled, synthetic=synthetic, seed=seed, ranks=ranks, workers=workers, augment=augment
        )
        self.image_size = image_size
        sources = [stream.dataset if stream else None for stream in (labeled, unlabeled, synthetic)]
        self.labeled, self.unlabeled, self.synthetic = (
            ResizedDataset(source, image_size, CACHE_BYTES, fit) if source else None for source in sources
        )
        self.windowed = windowed_orders(sources, shard_window)

    def load(
        self, labeled: list[StreamItem], unlabeled: list[StreamItem], synthetic: Sequence[StreamItem] = ()
    ) -> ByteBatch:
        elements = [
            *self._read(self.labeled, labeled, labeled=True),
            *self._read(self.synthetic, synthetic, labeled=True),
            *self._read(self.unlabeled, unlabeled, labeled=False),
        ]
        return replace(_collate(elements, self.image_size), ultrasound=self.augment == "ultrasound")

    @staticmethod
    def _read(
        dataset: ResizedDataset | None, items: Iterable[StreamItem], labeled: bool
    ) -> "Generator[_BatchElement, None, None]":
        for item in items:
            assert dataset is not None
            sample = dataset[item.index]
            if labeled and sample.mask is None:
                raise UserError(
                    f"loader: record {sample.key!r} of the labeled stream has no mask. "
                    "List it as unlabeled in the split, or create its shards again with its mask."
                )
            yield _BatchElement(sample, item.offset, item.symmetry, labeled)


class EvalLoader:
    """Every sample of `dataset` exactly once over all ranks, not augmented; rank r has indices r, r + world, ...

    Args:
        in_step: give all ranks the same number of batches (`evaluation_batches`).

    Raises:
        UserError: `dataset` is empty.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        batch: int,
        image_size: int,
        ranks: Ranks,
        workers: int = 0,
        fit: Fit = "stretch",
        in_step: bool = False,
    ) -> None:
        check_stream("evaluation", Stream(dataset, batch))
        self.dataset = dataset
        self.fit = fit
        self.image_size = image_size
        self.indices = range(ranks.rank, len(dataset), ranks.world)
        self._batches = evaluation_batches(len(dataset), batch, ranks.rank, ranks.world, in_step)
        self.workers = workers

    def batches(self) -> Generator[ByteBatch, None, None]:
        """Yield batches of at most `batch` samples, whose offsets are their dataset indices.

        If some samples have no mask, the labeled ones of a batch come first.

        Raises:
            UserError: a record can't be read.
        """
        count = len(self._batches)
        yield from load_in_order(self._load, range(count), min(self.workers, count))

    def _load(self, number: int) -> ByteBatch:
        samples = [(index, self.dataset[index]) for index in self._batches[number]]
        samples.sort(key=lambda each: each[1].mask is None)
        elements = [
            _BatchElement(fit_sample(sample, self.image_size, self.fit), index, 0, labeled=sample.mask is not None)
            for index, sample in samples
        ]
        batch = _collate(elements, self.image_size)
        if self.fit not in STRETCHED:
            batch.own_masks = [torch.from_numpy(sample.mask > 0) for _, sample in samples if sample.mask is not None]
        return batch


def check_stream(name: str, stream: Stream[Sized]) -> None:
    """Raise UserError if a stream has no samples, or takes none per step."""
    if len(stream.dataset) == 0:
        raise UserError(f"loader: there are no {name} images. Check the split and the shard folder.")
    if stream.batch_size < 1:
        raise UserError(f"loader: the batch size of the {name} stream is {stream.batch_size}. Set it to 1 or more.")


@dataclass(frozen=True)
class _BatchElement:
    """A sample of a batch: its offset, the symmetry to apply, and whether its mask is included."""

    sample: Sample
    offset: int
    symmetry: int
    labeled: bool


def _collate(elements: list[_BatchElement], size: int) -> ByteBatch:
    """Assemble the batch of `elements`, whose labeled samples come first."""
    labeled = sum(element.labeled for element in elements)
    images = np.empty((len(elements), 1, size, size), np.uint8)
    masks = np.empty((labeled, 1, size, size), np.bool_)
    for row, element in enumerate(elements):
        images[row, 0] = symmetry(element.sample.image, element.symmetry)
        if element.labeled:
            assert element.sample.mask is not None
            masks[row, 0] = symmetry(element.sample.mask, element.symmetry) > 0
    offsets = torch.tensor([element.offset for element in elements], dtype=torch.int64)
    keys = [element.sample.key for element in elements]
    return ByteBatch(torch.from_numpy(images), torch.from_numpy(masks), offsets, keys)
