"""What a reader of a data set is: what there is, listed first, then each sample read when asked for.

What is wrong with files is a `BadFile` that names the file: found while listing (in `problems`), or raised by `read`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mgcc_dist.common.files import sha256_of
from mgcc_dist.common.progress import track
from mgcc_dist.data import duplicates
from mgcc_dist.data.images import BadFile, read_grey, read_mask
from mgcc_dist.data.sample import Sample, is_key


class Reader(Protocol):
    """What `write_shards` converts."""

    dataset: str
    arguments: dict[str, Any]  # what the samples depend on, comparable between runs
    problems: list[BadFile]  # found while listing; the files are not among the samples
    notes: list[str]  # what is no problem, but people should be told: lines of text

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Sample `i` at its original size, without "group" in its meta. Raises BadFile."""

    def groups(self) -> list[str]:
        """For each sample the name of its split group."""


@dataclass(frozen=True)
class Item:
    """One image file and its mask files, whose union is the mask; none: the image is unlabeled."""

    key: str
    category: str
    image: Path
    masks: tuple[Path, ...]
    patient: str | None = None  # the split group, where the data set says whose image it is


class ImageFiles:
    """A reader of image files. Groups are patients, or near-duplicates (duplicates.py) where patients are unknown.

    `lists` are further files that the samples depend on: classes, patients, outlines.
    """

    def __init__(
        self,
        dataset: str,
        root: Path,
        items: Iterable[Item],
        problems: Iterable[BadFile],
        lists: Sequence[Path] = (),
        notes: Iterable[str] = (),
    ) -> None:
        self.dataset = dataset
        self.items: list[Item] = []
        self.problems = list(problems)
        self.notes = list(notes)
        seen: dict[str, Path] = {}
        for item in sorted(items, key=lambda item: (item.key, item.image)):
            if item.key in seen:
                self.problems.append(BadFile(item.image, f"has the same key {item.key!r} as {seen[item.key]}"))
            elif not is_key(item.key):
                self.problems.append(BadFile(item.image, "has a name that cannot be a key; rename it"))
            else:
                seen[item.key] = item.image
                self.items.append(item)
        files = sorted(path for item in self.items for path in (item.image, *item.masks))
        listing = "\n".join(f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in files)
        self.arguments: dict[str, Any] = {"files": len(files), "names_and_sizes_sha256": _sha256(listing)}
        if lists:
            listing = "\n".join(f"{path.relative_to(root).as_posix()} {sha256_of(path)}" for path in sorted(lists))
            self.arguments["lists_sha256"] = _sha256(listing)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        item = self.items[index]
        image = read_grey(item.image)
        height, width = image.shape
        meta = {"dataset": self.dataset, "class": item.category, "original_size": [width, height]}
        return Sample(item.key, image, self.mask(item, width, height), meta)

    def mask(self, item: Item, width: int, height: int) -> np.ndarray | None:
        """The mask of an image of that size, uint8 [height,width] of 0 and 255, or None. Raises BadFile."""
        mask = None
        for path in item.masks:
            part = read_mask(path)
            if part.shape != (height, width):
                raise BadFile(path, f"is {part.shape[1]}x{part.shape[0]} but its image is {width}x{height}")
            mask = part if mask is None else mask | part
        return mask

    def groups(self) -> list[str]:
        patients = [item.patient for item in self.items if item.patient is not None]
        if len(patients) == len(self.items):
            return patients
        keys, thumbnails = [], []
        for item in track(self.items, "searching near-duplicates", "images"):
            try:
                thumbnails.append(duplicates.thumbnail(read_grey(item.image)))
                keys.append(item.key)
            except BadFile:  # `read` reports it; here it stays alone
                continue
        found = dict(zip(keys, duplicates.groups(keys, duplicates.similar_pairs(thumbnails)), strict=True))
        return [found.get(item.key, item.key) for item in self.items]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
