"""Where samples come from, by number: shard folders, parts of them, several as one, and all at one size."""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.images import resize_image, resize_mask
from mgcc_dist.data.records import Sample, ShardFolder


class Source(Protocol):
    """Samples by number; a ShardFolder is one. Must be picklable."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> Sample: ...


class Subset:
    """The samples `indices` of `source`, in that order."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, i: int) -> Sample:
        return self.source.read(self.indices[i])


class Concat:
    """The samples of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, i: int) -> Sample:
        which = bisect_right(self.ends, i)
        return self.sources[which].read(i - self.ends[which] + len(self.sources[which]))


class Resized:
    """The samples of `source` stretched to `size` x `size`; `kept_bytes` of them stay decoded in this process.

    Those of a copy that is pickled to another process do not come with it.
    """

    def __init__(self, source: Source, size: int, kept_bytes: int = 0) -> None:
        self.source = source
        self.size = size
        self._room = self.kept_bytes = kept_bytes
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_room": self.kept_bytes}

    def read(self, i: int) -> Sample:
        if i in self._kept:
            return self._kept[i]
        sample = self.source.read(i)
        image = resize_image(sample.image, self.size, self.size)
        mask = None if sample.mask is None else resize_mask(sample.mask, self.size, self.size)
        sample = replace(sample, image=image, mask=mask)
        takes = image.nbytes + (0 if mask is None else mask.nbytes)
        if takes <= self._room:
            self._room -= takes
            self._kept[i] = sample
        return sample


def subset_by_keys(folder: ShardFolder, keys: Iterable[str]) -> Subset:
    """The records `keys` of a shard folder, in that order.

    Raises:
        UserError: keys that the folder does not have; names the first of them.
    """
    known = set(folder.keys())
    keys = list(keys)
    missing = [key for key in keys if key not in known]
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{folder.folder} lacks {len(missing)} of the {len(keys)} keys asked for: {shown}; "
            "is the split made for another data set?"
        )
    return Subset(folder, [folder.position(key) for key in keys])
