"""BUSI: breast, 780 images.

Al-Dhabyani, Gomaa, Khaled, Fahmy, "Dataset of breast ultrasound images", Data in Brief 28 (2020) 104863.
"""

import re
from pathlib import Path

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import attach_masks, find_images, require_subfolder
from mgcc_dist.data.readers.reader import ImageFileReader, ImageItem

LAYOUT = "benign/, malignant/, normal/"
CLASSES = ("benign", "malignant", "normal")
NAME = re.compile(r"(?P<stem>(?P<category>benign|malignant|normal) \(\d+\))(?P<mask>_mask(_\d+)?)?\.(png|PNG)")


def busi(root: Path) -> ImageFileReader:
    """BUSI: `CLASS/CLASS (N).png`, `CLASS/CLASS (N)_mask.png` and sometimes `_mask_1.png`, `_mask_2.png`.

    The mask of an image is the union of its mask files. Normal images have empty masks. No patient ids.

    Raises:
        UserError: the root or a class folder does not exist or has no images.
    """
    images: dict[str, ImageItem] = {}
    masks: dict[str, list[Path]] = {}
    bad_files: list[BadFile] = []
    for category in CLASSES:
        for path in find_images(require_subfolder(root, category, LAYOUT)):
            name = NAME.fullmatch(path.name)
            if not name or name["category"] != category:
                bad_files.append(BadFile(path, f"is not named like this data set's files, '{category} (1).png'"))
            elif name["mask"]:
                masks.setdefault(name["stem"], []).append(path)
            elif name["stem"] in images:
                bad_files.append(BadFile(path, f"has the same name as {images[name['stem']].image}"))
            else:
                images[name["stem"]] = ImageItem(name["stem"], category, path)
    return ImageFileReader("busi", root, attach_masks(images, masks, bad_files).values(), bad_files)
