"""Readers of image data sets: what there is, listed first, then each sample read when asked for.

A reader is built by `busi`, `folder` or `Phantoms`. Another data set is another function here that lists its items.
What is wrong with files is a `BadFile` that names the file: found while listing (in `problems`), or raised by `read`.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from mgcc_dist.data import duplicates, phantom
from mgcc_dist.data.images import SUFFIXES, BadFile, read_grey, read_mask
from mgcc_dist.data.records import Sample, is_key
from mgcc_dist.errors import UserError

BUSI_CLASSES = ("benign", "malignant", "normal")
BUSI_NAME = re.compile(r"(?P<stem>(?P<category>benign|malignant|normal) \(\d+\))(?P<mask>_mask(_\d+)?)?\.png")


class Reader(Protocol):
    """What `write_shards` converts."""

    dataset: str
    arguments: dict[str, Any]  # what the samples depend on, comparable between runs
    problems: list[BadFile]  # found while listing; the files are not among the samples

    def __len__(self) -> int: ...

    def read(self, i: int) -> Sample:
        """Sample `i` at its original size, without "group" in its meta. Raises BadFile."""

    def groups(self) -> list[str]:
        """For each sample the name of its split group."""


class Phantoms:
    """The built-in synthetic data (see phantom.py): `count` images of `size` x `size`."""

    dataset = "phantom"

    def __init__(self, count: int, seed: int, size: int) -> None:
        self.arguments = {"count": count, "seed": seed, "size": size}
        self.problems: list[BadFile] = []
        self._keys = [f"phantom-{seed}-{i:06d}" for i in range(count)]

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, i: int) -> Sample:
        seed, size = self.arguments["seed"], self.arguments["size"]
        drawn = phantom.draw(seed, i, size)
        meta = {"dataset": self.dataset, "class": drawn.category, "original_size": [size, size]}
        return Sample(self._keys[i], drawn.image, drawn.mask, {**meta, "seed": seed, "index": i})

    def groups(self) -> list[str]:
        return list(self._keys)


@dataclass(frozen=True)
class Item:
    """One image file and its mask files, whose union is the mask; none: the image is unlabeled."""

    key: str
    category: str
    image: Path
    masks: tuple[Path, ...]


class ImageFiles:
    """A reader of image files without patient ids: groups are near-duplicates (see duplicates.py)."""

    def __init__(self, dataset: str, root: Path, items: Iterable[Item], problems: Iterable[BadFile]) -> None:
        self.dataset = dataset
        self.items: list[Item] = []
        self.problems = list(problems)
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
        self.arguments = {"files": len(files), "names_and_sizes_sha256": hashlib.sha256(listing.encode()).hexdigest()}

    def __len__(self) -> int:
        return len(self.items)

    def read(self, i: int) -> Sample:
        item = self.items[i]
        image = read_grey(item.image)
        height, width = image.shape
        mask = None
        for path in item.masks:
            part = read_mask(path)
            if part.shape != image.shape:
                raise BadFile(path, f"is {part.shape[1]}x{part.shape[0]} but its image is {width}x{height}")
            mask = part if mask is None else mask | part
        meta = {"dataset": self.dataset, "class": item.category, "original_size": [width, height]}
        return Sample(item.key, image, mask, meta)

    def groups(self) -> list[str]:
        keys, thumbnails = [], []
        for item in tqdm(self.items, desc="looking for near-duplicates", unit="image", disable=None):
            try:
                thumbnails.append(duplicates.thumbnail(read_grey(item.image)))
                keys.append(item.key)
            except BadFile:  # `read` reports it; here it stays alone
                continue
        found = dict(zip(keys, duplicates.groups(keys, duplicates.similar_pairs(thumbnails)), strict=True))
        return [found.get(item.key, item.key) for item in self.items]


def busi(root: Path) -> ImageFiles:
    """BUSI as published: `CLASS/CLASS (N).png`, `CLASS/CLASS (N)_mask.png` and at times `_mask_1.png`, `_mask_2.png`.

    Raises:
        UserError: the root or a class folder is not there or holds no image.
    """
    _existing(root)
    images: dict[str, Item] = {}
    masks: dict[str, list[Path]] = {}
    problems = []
    for category in BUSI_CLASSES:
        if not (root / category).is_dir():
            raise UserError(
                f"{root} has no folder {category!r}; --root is the folder that holds benign/, malignant/, normal/"
            )
        files = _images_in(root / category)
        for path in files:
            name = BUSI_NAME.fullmatch(path.name)
            if not name or name["category"] != category:
                problems.append(BadFile(path, f"is not named like BUSI's files, '{category} (1).png'"))
            elif name["mask"]:
                masks.setdefault(name["stem"], []).append(path)
            else:
                images[name["stem"]] = Item(name["stem"], category, path, ())
    items, more = _with_masks(images, masks)
    return ImageFiles("busi", root, items, problems + more)


def folder(root: Path) -> ImageFiles:
    """`images/NAME.*` and `masks/NAME.*`; both may have subfolders, the first of which is the class.

    Without a `masks` folder all images are unlabeled; with one every image needs a mask of the same name (the suffix
    may differ). Keys are the stems, with `_` for dots.

    Raises:
        UserError: the root or its images folder is not there or holds no image.
    """
    _existing(root)
    if not (root / "images").is_dir():
        raise UserError(f"{root} has no folder 'images'; put the images there, and their masks into 'masks'")
    images: dict[str, Item] = {}
    problems = []
    for path in _images_in(root / "images"):
        inner = path.relative_to(root / "images")
        name = inner.with_suffix("").as_posix()
        category = inner.parts[0] if len(inner.parts) > 1 else "unknown"
        if name in images:
            problems.append(BadFile(path, f"has the same key as {images[name].image}"))
        else:
            images[name] = Item(path.stem.replace(".", "_"), category, path, ())
    if not (root / "masks").is_dir():
        return ImageFiles("folder", root, images.values(), problems)
    masks: dict[str, list[Path]] = {}
    for path in _images_in(root / "masks"):
        masks.setdefault(path.relative_to(root / "masks").with_suffix("").as_posix(), []).append(path)
    items, more = _with_masks(images, masks)
    return ImageFiles("folder", root, items, problems + more)


def _with_masks(images: dict[str, Item], masks: dict[str, list[Path]]) -> tuple[list[Item], list[BadFile]]:
    """The items that have masks, with them; and images without mask and masks without image."""
    items = [
        Item(item.key, item.category, item.image, tuple(masks[name])) for name, item in images.items() if name in masks
    ]
    problems = [BadFile(item.image, "has no mask") for name, item in images.items() if name not in masks]
    problems += [BadFile(path, "has no image") for name, paths in masks.items() if name not in images for path in paths]
    return items, problems


def _existing(root: Path) -> None:
    if not root.is_dir():
        raise UserError(f"{root} is not there; --root is the folder that holds the data set")


def _images_in(place: Path) -> list[Path]:
    """All image files below `place`, sorted; hidden ones are not for us."""
    files = sorted(
        path
        for path in place.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise UserError(f"{place} holds no image ({', '.join(SUFFIXES)})")
    return files
