"""The reader interface: a map-style dataset that lists its files first and reads each sample on access.

A file that cannot be used is a `BadFile`: either found while listing (in `bad_files`) or raised on access.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mgcc_dist.common.files import sha256_of
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.data.file_listing import describe_unread, readable_name, walk_files
from mgcc_dist.data.images import BadFile, bits_used, find_unreadable, read_grey
from mgcc_dist.data.masks import MaskFacts, read_mask
from mgcc_dist.data.sample import Sample, is_key

READ_AHEAD = 256  # images read in threads before the caller takes them
_KNOWS_PATIENTS = "knows_patients"


class Reader(Protocol):
    """What `write_shards` converts."""

    kind: str  # the command that reads it
    dataset: str  # its name in shards and results
    arguments: dict[str, Any]  # what the samples depend on, comparable between runs
    bad_files: list[BadFile]  # found while listing; not among the samples
    notes: list[str]  # lines to show to the user that are not errors
    mask_facts: dict[str, list[MaskFacts]]  # by key, of the mask files read so far

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample:
        """Read a sample at its original size, without "group" in its meta. Raises BadFile."""

    def groups(self) -> list[str]:
        """Return the split group of each sample."""


@dataclass(frozen=True)
class ImageItem:
    """An image file and its mask files, whose union is the mask; without mask files the image is unlabeled."""

    key: str
    category: str
    image: Path
    masks: tuple[Path, ...] = ()
    patient: str | None = None  # the split group, if the dataset identifies patients
    fold: str | None = None  # of the folds that the dataset's authors published, or splits.TEST
    device: str | None = None  # the scanner, if the dataset names it


SAME_NAME = ". If subfolders are patients, use --groups patient; otherwise give each image a name of its own"


class ImageFileReader:
    """Reader of image files. Groups are patients, or near-duplicates (duplicates.py) if patients are unknown.

    `lists` are further files that the samples depend on: classes, patients, outlines. `unread` is a note about
    the files in `root` that are none of these, or empty.
    """

    def __init__(
        self,
        dataset: str,
        root: Path,
        items: Iterable[ImageItem],
        bad_files: Iterable[BadFile],
        lists: Sequence[Path] = (),
        notes: Iterable[str] = (),
    ) -> None:
        self.kind = self.dataset = dataset
        self.similar_groups = True
        self.items: list[ImageItem] = []
        self.bad_files = list(bad_files)
        self.notes = list(notes)
        self.mask_facts: dict[str, list[MaskFacts]] = {}
        self.label_values: tuple[int, ...] = ()
        image_by_key: dict[str, Path] = {}
        items = [replace(item, key=readable_name(item.key), category=readable_name(item.category)) for item in items]
        unreadable = {
            path: bad for item in items for path in (item.image, *item.masks) if (bad := find_unreadable(path))
        }
        self.bad_files += unreadable.values()
        for item in sorted(items, key=lambda item: (item.key, item.image)):
            if item.key in image_by_key:
                other = image_by_key[item.key]
                hint = SAME_NAME if item.image.name == other.name else ""
                self.bad_files.append(BadFile(item.image, f"has the same key {item.key!r} as {other}{hint}"))
            elif not is_key(item.key):
                self.bad_files.append(BadFile(item.image, "its name has characters that cannot be printed"))
            elif not unreadable.keys() & {item.image, *item.masks}:
                image_by_key[item.key] = item.image
                self.items.append(item)
        files = sorted(path for item in self.items for path in (item.image, *item.masks))
        listed = (path for item in items for path in (item.image, *item.masks))  # also those next to a bad file
        read = {*lists, *listed, *(bad.path for bad in self.bad_files)}
        self.unread = describe_unread((path for path in walk_files(root) if path not in read), root)
        listing = "\n".join(f"{path.relative_to(root).as_posix()} {sha256_of(path)}" for path in files)
        self.arguments: dict[str, Any] = {"files": len(files), "contents_sha256": _sha256(listing)}
        if lists:
            listing = "\n".join(
                f"{path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name} {sha256_of(path)}"
                for path in sorted(lists)
            )
            self.arguments["lists_sha256"] = _sha256(listing)

    def leave_ungrouped(self) -> None:
        """Make every image its own group if patients are unknown, instead of searching near-duplicates."""
        self.similar_groups = False
        self.arguments["groups"] = "none"

    @cached_property
    def bits(self) -> int | None:
        """How many bits of 16-bit pixels are used: one number for all images; None if no image has 16 bits."""
        return bits_used(item.image for item in self.items)

    def select_bits(self, bits: int) -> None:
        """Scale 16-bit images by this number of bits instead of the images' maximum."""
        self.bits = self.arguments["bits"] = bits

    def select_labels(self, values: Sequence[int]) -> None:
        """Take these values of the mask files as lesion, and all others as background."""
        self.label_values = tuple(values)
        self.arguments["label_values"] = list(values)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        item = self.items[index]
        image = read_grey(item.image, self.bits)
        height, width = image.shape
        meta = {"dataset": self.dataset, "class": item.category, "original_size": [width, height]}
        if item.fold is not None:
            meta["fold"] = item.fold
        if item.device is not None:
            meta["device"] = item.device
        return Sample(item.key, image, self.mask(item, width, height), meta)

    def mask(self, item: ImageItem, width: int, height: int) -> np.ndarray | None:
        """Return the mask uint8 [height,width] of 0 and 255 of an image of that size, or None. Raises BadFile."""
        mask, facts = None, []
        for path in item.masks:
            part, how_read = read_mask(path, self.label_values)
            facts.append(how_read)
            if part.shape != (height, width):
                raise BadFile(path, f"is {part.shape[1]}x{part.shape[0]} but its image is {width}x{height}")
            mask = part if mask is None else mask | part
        self.mask_facts[item.key] = facts
        return mask

    def groups(self) -> list[str]:
        patients = [item.patient for item in self.items if item.patient is not None]
        if len(patients) == len(self.items):
            return patients
        if not self.similar_groups:
            return [item.key for item in self.items]
        from mgcc_dist.data import duplicates  # imports SciPy, which only this search needs

        with ProgressBar(len(self.items), "searching near-duplicates", "images") as bar:
            groups = duplicates.groups(bar.count(self._thumbnails()))
        return [groups[item.key] for item in self.items]

    def _thumbnails(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the key of each image, and its thumbnail for the comparison with others."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self.items), READ_AHEAD):
                items = self.items[start : start + READ_AHEAD]
                yield from zip((item.key for item in items), pool.map(self._thumbnail, items), strict=True)

    def _thumbnail(self, item: ImageItem) -> np.ndarray:
        from mgcc_dist.data import duplicates

        try:
            return duplicates.thumbnail(read_grey(item.image, self.bits))
        except BadFile:  # reported when the sample is read; an image without structure is in a group of its own
            return np.zeros((duplicates.SIDE, duplicates.SIDE), np.float32)


def with_patients(read: Callable[[Path], ImageFileReader]) -> Callable[[Path], ImageFileReader]:
    """Mark a function whose reader groups by patient, never by near-duplicates. A decorator."""
    setattr(read, _KNOWS_PATIENTS, True)
    return read


def knows_patients(read: Callable[[Path], ImageFileReader]) -> bool:
    """Return whether a function is marked by `with_patients`."""
    return getattr(read, _KNOWS_PATIENTS, False)


def _sha256(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()
