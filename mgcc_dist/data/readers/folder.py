"""Anybody's own images."""

from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import existing, images_in, with_masks
from mgcc_dist.data.readers.reader import ImageFiles, Item


def folder(root: Path) -> ImageFiles:
    """Your own: `images/NAME.*` and `masks/NAME.*`; both may have subfolders, the first of which is the class.

    Without a `masks` folder all images are unlabeled; with one every image needs a mask of the same name (the suffix
    may differ). Keys are the stems, with `_` for dots.

    Raises:
        UserError: the root or its images folder is not there or holds no image.
    """
    existing(root)
    if not (root / "images").is_dir():
        raise UserError(f"{root} has no folder 'images'; put the images there, and their masks into 'masks'")
    images: dict[str, Item] = {}
    problems = []
    for path in images_in(root / "images"):
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
    for path in images_in(root / "masks"):
        masks.setdefault(path.relative_to(root / "masks").with_suffix("").as_posix(), []).append(path)
    items, more = with_masks(images, masks)
    return ImageFiles("folder", root, items.values(), problems + more)
