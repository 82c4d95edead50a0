"""Find a dataset's files: required folders, images by name, images with their masks."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.dicom import is_dicom
from mgcc_dist.data.file_listing import walk_files
from mgcc_dist.data.images import SUFFIXES, BadFile
from mgcc_dist.data.readers.reader import ImageItem


def require_root(root: Path) -> None:
    """Raise UserError unless the root folder exists."""
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"{root}: {problem}. Set --root to the folder of the data set.")


def require_subfolder(root: Path, name: str, layout: str) -> Path:
    """Return the folder `name` of the root; `layout` lists what the root should contain, for the message.

    Raises:
        UserError: the root or the folder does not exist.
    """
    require_root(root)
    if not (root / name).is_dir():
        raise UserError(f"{root}: has no folder {name!r}. Set --root to the folder that contains {layout}.")
    return root / name


def find_images(folder: Path) -> list[Path]:
    """Return all image files in `folder` and its subfolders (see `walk_files`), sorted; also links to missing ones.

    Raises:
        UserError: there are none, or a link leads in a loop.
    """
    files = sorted(path for path in walk_files(folder) if path.suffix.lower() in SUFFIXES)
    if not files and any(is_dicom(path) for path in walk_files(folder)):
        raise UserError(f"{folder}: holds DICOM, which only `mgcc predict` reads. Save the images as PNG files.")
    if not files:
        raise UserError(f"{folder}: no images found ({', '.join(SUFFIXES)})")
    return files


def index_by_name(
    files: Iterable[Path], stem: re.Pattern[str], example: str, bad_files: list[BadFile]
) -> dict[str, Path]:
    """Index the files by the "name" group of `stem`, without leading zeros (see `image_name`).

    Files whose stem does not match, or whose name is taken, go to `bad_files`.
    """
    found: dict[str, Path] = {}
    for path in files:
        match = stem.fullmatch(path.stem)
        name = image_name(match["name"]) if match else ""
        if not match:
            bad_files.append(BadFile(path, f"is not named like this data set's files, {example!r}"))
        elif name in found:
            bad_files.append(BadFile(path, f"has the same name as {found[name]}"))
        else:
            found[name] = path
    return found


def image_name(text: str) -> str:
    """Normalise a name for matching files with lists: numbers lose their leading zeros."""
    return str(int(text)) if text.isdecimal() else text


def pair_with_masks(
    images: dict[str, Path], masks: dict[str, Path], bad_files: list[BadFile], prefix: str = ""
) -> dict[str, ImageItem]:
    """Return items of class "unknown" for the images that have a mask of the same name, keyed by prefix and stem.

    Images without a mask and masks without an image go to `bad_files`.
    """
    items = {name: ImageItem(f"{prefix}{path.stem}", "unknown", path) for name, path in images.items()}
    return attach_masks(items, {name: [path] for name, path in masks.items()}, bad_files)


def attach_masks(
    items: dict[str, ImageItem], masks: dict[str, list[Path]], bad_files: list[BadFile]
) -> dict[str, ImageItem]:
    """Return the items that have masks, with them; unmatched images and masks go to `bad_files`."""
    bad_files += [BadFile(item.image, "has no mask") for name, item in items.items() if name not in masks]
    bad_files += [BadFile(path, "has no image") for name, paths in masks.items() if name not in items for path in paths]
    return {name: replace(item, masks=tuple(masks[name])) for name, item in items.items() if name in masks}
