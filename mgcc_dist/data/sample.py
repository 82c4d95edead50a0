"""One sample of a dataset, in memory. Imports neither torch nor webdataset, so that readers stay quick to import."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Fit = Literal["stretch", "letterbox", "crop", "released"]
"""how an image becomes a square; see data/geometry.py"""
STRETCHED: tuple[Fit, ...] = ("stretch", "released")
"""fits that show the complete image in the complete square"""


@dataclass(frozen=True, eq=False)
class Sample:
    """One image, with its mask if it is labeled.

    `key` has no dots and no slashes (BUSI: the stem as published, "benign (433)"). `image` is uint8 [H,W]; `mask` is
    uint8 [H,W] of 0 and 255, or None. `meta`: "dataset", "class", "original_size" [width, height], "group" (a split
    keeps the records of a group together); synthetic images add "checkpoint", "seed", "index". `write_shard` adds
    "sha256" and "mask_sha256", those of the PNG files.
    """

    key: str
    image: np.ndarray
    mask: np.ndarray | None
    meta: dict[str, Any]


@dataclass(frozen=True)
class RecordInfo:
    """A record's entry in index.json; `category` is "class" there. `fold` is that of a published split, or empty.

    `files` are the name and sha256 of the image and of the mask, of a record in shards that another program wrote.
    """

    key: str
    shard: str
    labeled: bool
    category: str
    group: str
    fold: str = ""
    files: tuple[tuple[str, str], ...] = ()


def is_key(text: str) -> bool:
    """Return whether `text` can be the key of a WebDataset record."""
    return bool(text) and all(letter not in "./" and letter.isprintable() for letter in text)
