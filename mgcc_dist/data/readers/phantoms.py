"""Reader of the built-in synthetic data."""

from typing import Any

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.masks import MaskFacts
from mgcc_dist.data.sample import Sample


class Phantoms:
    """The built-in synthetic data (see phantom.py): `count` images of `size` x `size`."""

    kind = dataset = "phantom"

    def __init__(self, count: int, seed: int, size: int) -> None:
        self.arguments: dict[str, Any] = {"count": count, "seed": seed, "size": size}
        self.bad_files: list[BadFile] = []
        self.notes: list[str] = []
        self.mask_facts: dict[str, list[MaskFacts]] = {}
        self._keys = [f"phantom-{seed}-{index:06d}" for index in range(count)]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Sample:
        from mgcc_dist.data.phantom import draw  # imports SciPy, which `mgcc shards --help` does not need

        seed, size = self.arguments["seed"], self.arguments["size"]
        phantom = draw(seed, index, size)
        meta = {"dataset": self.dataset, "class": phantom.category, "original_size": [size, size]}
        return Sample(self._keys[index], phantom.image, phantom.mask, {**meta, "seed": seed, "index": index})

    def groups(self) -> list[str]:
        return list(self._keys)
