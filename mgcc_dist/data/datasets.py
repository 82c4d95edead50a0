"""Map-style datasets of samples: subsets of a shard folder by key, and images resized to one size."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch.utils.data import Dataset, Subset

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.geometry import Fit, fit_sample
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.sample import Sample


class SampleDataset(Protocol):
    """A picklable map-style dataset of samples that has a length (torch's `Dataset` declares none)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class ResizedDataset(Dataset[Sample]):
    """The samples of `dataset` as squares of `size` x `size`, with up to `cache_bytes` of them cached in this process.

    The cache is not pickled.
    """

    def __init__(self, dataset: SampleDataset, size: int, cache_bytes: int = 0, fit: Fit = "stretch") -> None:
        self.dataset = dataset
        self.size = size
        self.fit = fit
        self._free_bytes = self.cache_bytes = cache_bytes
        self._cache: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_free_bytes": self.cache_bytes}

    def __getitem__(self, index: int) -> Sample:
        if index in self._cache:
            return self._cache[index]
        sample = fit_sample(self.dataset[index], self.size, self.fit)
        nbytes = sample.image.nbytes + (0 if sample.mask is None else sample.mask.nbytes)
        if nbytes <= self._free_bytes:
            self._free_bytes -= nbytes
            self._cache[index] = sample
        return sample


def subset_by_keys(folder: ShardFolder, keys: Iterable[str], by_shard: bool = False) -> Subset[Sample]:
    """Return the records `keys` of a shard folder, in that order or, `by_shard`, in that of the folder.

    Raises:
        UserError: the folder does not have all the keys; the message names up to five missing ones.
    """
    known = set(folder.keys())
    keys = list(keys)
    missing = [key for key in keys if key not in known]
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{folder.folder}: {len(missing)} of {len(keys)} requested keys are missing: {shown}. "
            "Check that the split belongs to this data set."
        )
    indices = [folder.index_of(key) for key in keys]
    return Subset(folder, sorted(indices) if by_shard else indices)


def labeled_subset(folder: ShardFolder, keys: Sequence[str], use: str, by_shard: bool = False) -> Subset[Sample]:
    """Return the same if all of the records have a mask; `use` names them in messages.

    Raises:
        UserError: there are no keys, or the folder does not have all of them, or some have no mask.
    """
    if not keys:
        raise UserError(f"data.split: has no {use} records, and `mgcc segment` needs some. Choose another split.")
    subset = subset_by_keys(folder, keys, by_shard)
    unmasked = [record.key for record in (folder.records[i] for i in subset.indices) if not record.labeled]
    if unmasked:
        raise UserError(
            f"{folder.folder}: {len(unmasked)} of the split's {len(keys)} {use} records have no mask, the first is "
            f"{unmasked[0]!r}. Make a split of this folder with `mgcc shards split`."
        )
    return subset
