"""The built-in synthetic data as a reader."""

from typing import Any

from mgcc_dist.data import phantom
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.sample import Sample


class Phantoms:
    """The built-in synthetic data (see phantom.py): `count` images of `size` x `size`."""

    dataset = "phantom"

    def __init__(self, count: int, seed: int, size: int) -> None:
        self.arguments: dict[str, Any] = {"count": count, "seed": seed, "size": size}
        self.problems: list[BadFile] = []
        self.notes: list[str] = []
        self._keys = [f"phantom-{seed}-{i:06d}" for i in range(count)]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Sample:
        seed, size = self.arguments["seed"], self.arguments["size"]
        drawn = phantom.draw(seed, index, size)
        meta = {"dataset": self.dataset, "class": drawn.category, "original_size": [size, size]}
        return Sample(self._keys[index], drawn.image, drawn.mask, {**meta, "seed": seed, "index": index})

    def groups(self) -> list[str]:
        return list(self._keys)
