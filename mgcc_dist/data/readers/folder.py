"""Your own images."""

import re
from collections.abc import Collection
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.file_listing import readable_name
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import find_images, require_root
from mgcc_dist.data.readers.patients import SUBFOLDER, is_list, patient_reader
from mgcc_dist.data.readers.reader import ImageFileReader, ImageItem

MASK_NAME = re.compile(r"(?P<image>.+?)[-_ ](mask|gt|seg|segmentation|label)s?([-_ ]?\d+)?", re.IGNORECASE)
SIMILAR = 0.6  # of difflib: names that may be the same with a typo


def folder(root: Path, patient: str = "") -> ImageFileReader:
    """Your own data: `images/NAME.*` and `masks/NAME.*`; with subfolders, the first one is the class.

    Masks have the name of their image, also with `_mask`, `_gt`, `_seg` or `_label` at the end (and a number: the mask
    is the union). The file type may differ. Images without a mask are unlabeled; a mask without an image is an error.
    Keys are the file names without suffix, with `_` instead of dots; they must be unique in all subfolders.

    Groups are near-duplicates; with `--groups patient` all images of a patient. With `--patient subfolder` the last
    subfolder is the patient, a first one above it the class, and keys include the subfolders.

    Raises:
        UserError: the root or its images folder does not exist or has no images.
    """
    require_root(root)
    if not (root / "images").is_dir():
        raise UserError(f"{root}: has no folder 'images'. Put the images there and their masks into 'masks'.")
    images: dict[str, ImageItem] = {}
    bad_files: list[BadFile] = []
    rejected: set[str] = set()
    patient_of = patient_reader(patient) if patient else None
    lists = [Path(patient)] if is_list(patient) else []
    for path in find_images(root / "images"):
        relative = path.relative_to(root / "images")
        name = readable_name(relative.with_suffix("").as_posix())
        subfolders = relative.parts[: -2 if patient == SUBFOLDER else -1]
        item = ImageItem(
            (name.replace("/", "_") if patient == SUBFOLDER else path.stem).replace(".", "_"),
            subfolders[0] if subfolders else "unknown",
            path,
        )
        try:
            if name in images:
                raise BadFile(path, f"has the same key as {images[name].image}")
            images[name] = replace(item, patient=f"patient-{patient_of(path, name)}") if patient_of else item
        except BadFile as bad:
            bad_files.append(bad)
            rejected.add(name)
    if not (root / "masks").is_dir():
        return ImageFileReader("folder", root, images.values(), bad_files, lists)
    masks: dict[str, list[Path]] = {}
    for path in find_images(root / "masks"):
        name = readable_name(path.relative_to(root / "masks").with_suffix("").as_posix())
        name = _image_of(name, images.keys() | rejected)
        if name in images or name not in rejected:
            masks.setdefault(name, []).append(path)
    return ImageFileReader("folder", root, _attach_masks(images, masks, bad_files), bad_files, lists)


def _image_of(mask: str, images: Collection[str]) -> str:
    """Return the name of the image that a mask of that name belongs to, or the mask's own name if there is none."""
    match = MASK_NAME.fullmatch(mask)
    return match["image"] if mask not in images and match and match["image"] in images else mask


def _attach_masks(
    images: dict[str, ImageItem], masks: dict[str, list[Path]], bad_files: list[BadFile]
) -> list[ImageItem]:
    """Return the items with their masks; those without are unlabeled.

    Masks without an image go to `bad_files`, with the image whose name looks like a typo of theirs.
    """
    items = {name: replace(item, masks=tuple(masks.get(name, ()))) for name, item in images.items()}
    unlabeled = [name for name, item in items.items() if not item.masks]
    for name, paths in masks.items():
        if name in images:
            continue
        nearest = get_close_matches(name, unlabeled, n=1, cutoff=SIMILAR)
        hint = f" (the nearest name is {nearest[0]!r})" if nearest else ""
        bad_files += [BadFile(path, f"has no image{hint}") for path in paths]
        if nearest and nearest[0] in items:
            bad_files.append(BadFile(items.pop(nearest[0]).image, f"has no mask, but there is {paths[0].name!r}"))
    return list(items.values())
