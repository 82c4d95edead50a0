"""Finding a data set's files: folders that must be there, images by name, images with their masks."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.images import SUFFIXES, BadFile
from mgcc_dist.data.readers.reader import Item


def existing(root: Path) -> None:
    """Raise UserError unless the root folder is there."""
    if not root.is_dir():
        raise UserError(f"{root} is not there; --root is the folder that holds the data set")


def subfolder(root: Path, name: str, layout: str) -> Path:
    """The folder `name` of the root, which is said to hold `layout`.

    Raises:
        UserError: the root or the folder is not there.
    """
    existing(root)
    if not (root / name).is_dir():
        raise UserError(f"{root} has no folder {name!r}; --root is the folder that holds {layout}")
    return root / name


def images_in(place: Path) -> list[Path]:
    """All image files below `place`, sorted; hidden ones are not for us.

    Raises:
        UserError: there is none.
    """
    files = sorted(
        path
        for path in place.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise UserError(f"{place} holds no image ({', '.join(SUFFIXES)})")
    return files


def by_name(files: Iterable[Path], stem: re.Pattern[str], like: str, problems: list[BadFile]) -> dict[str, Path]:
    """The files whose stem matches, by its group "name" without leading zeros (as `image_name`).

    A file of another name than `like`, or of a name that another has, goes to `problems`.
    """
    found: dict[str, Path] = {}
    for path in files:
        match = stem.fullmatch(path.stem)
        name = image_name(match["name"]) if match else ""
        if not match:
            problems.append(BadFile(path, f"is not named like the data set's files, {like!r}"))
        elif name in found:
            problems.append(BadFile(path, f"has the same name as {found[name]}"))
        else:
            found[name] = path
    return found


def image_name(text: str) -> str:
    """A name as file names and lists have in common: a number loses its leading zeros."""
    return str(int(text)) if text.isdecimal() else text


def paired(
    images: dict[str, Path], masks: dict[str, Path], problems: list[BadFile], prefix: str = ""
) -> dict[str, Item]:
    """The images that have a mask of the same name, of unknown class and keyed by their prefixed stems; others go to
    `problems`.
    """
    items = {name: Item(f"{prefix}{path.stem}", "unknown", path, ()) for name, path in images.items()}
    whole, more = with_masks(items, {name: [path] for name, path in masks.items()})
    problems += more
    return whole


def with_masks(images: dict[str, Item], masks: dict[str, list[Path]]) -> tuple[dict[str, Item], list[BadFile]]:
    """The items that have masks, with them; and images without mask and masks without image."""
    items = {name: replace(item, masks=tuple(masks[name])) for name, item in images.items() if name in masks}
    problems = [BadFile(item.image, "has no mask") for name, item in images.items() if name not in masks]
    problems += [BadFile(path, "has no image") for name, paths in masks.items() if name not in images for path in paths]
    return items, problems
