"""Your own images."""

from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.file_listing import readable_name
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import attach_masks, find_images, require_root
from mgcc_dist.data.readers.reader import ImageFileReader, ImageItem


def folder(root: Path) -> ImageFileReader:
    """Your own data: `images/NAME.*` and `masks/NAME.*`; with subfolders, the first one is the class.

    Without a `masks` folder all images are unlabeled. With one, every image needs a mask of the same name; the suffix
    may differ. Keys are the file stems, with `_` instead of dots.

    Raises:
        UserError: the root or its images folder does not exist or has no images.
    """
    require_root(root)
    if not (root / "images").is_dir():
        raise UserError(f"{root}: has no folder 'images'. Put the images there and their masks into 'masks'.")
    images: dict[str, ImageItem] = {}
    bad_files: list[BadFile] = []
    for path in find_images(root / "images"):
        relative = path.relative_to(root / "images")
        name = readable_name(relative.with_suffix("").as_posix())
        category = relative.parts[0] if len(relative.parts) > 1 else "unknown"
        if name in images:
            bad_files.append(BadFile(path, f"has the same key as {images[name].image}"))
        else:
            images[name] = ImageItem(path.stem.replace(".", "_"), category, path)
    if not (root / "masks").is_dir():
        return ImageFileReader("folder", root, images.values(), bad_files)
    masks: dict[str, list[Path]] = {}
    for path in find_images(root / "masks"):
        name = readable_name(path.relative_to(root / "masks").with_suffix("").as_posix())
        masks.setdefault(name, []).append(path)
    return ImageFileReader("folder", root, attach_masks(images, masks, bad_files).values(), bad_files)
