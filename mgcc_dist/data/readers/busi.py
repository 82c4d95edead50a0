"""BUSI: breast, 780 images.

Al-Dhabyani, Gomaa, Khaled, Fahmy, "Dataset of breast ultrasound images", Data in Brief 28 (2020) 104863.
"""

import re
from pathlib import Path

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import images_in, subfolder, with_masks
from mgcc_dist.data.readers.reader import ImageFiles, Item

LAYOUT = "benign/, malignant/, normal/"
CLASSES = ("benign", "malignant", "normal")
NAME = re.compile(r"(?P<stem>(?P<category>benign|malignant|normal) \(\d+\))(?P<mask>_mask(_\d+)?)?\.png")


def busi(root: Path) -> ImageFiles:
    """BUSI as published: `CLASS/CLASS (N).png`, `CLASS/CLASS (N)_mask.png` and at times `_mask_1.png`, `_mask_2.png`.

    Several masks of an image are united. Those of normal images are there and empty. No patient ids.

    Raises:
        UserError: the root or a class folder is not there or holds no image.
    """
    images: dict[str, Item] = {}
    masks: dict[str, list[Path]] = {}
    problems = []
    for category in CLASSES:
        for path in images_in(subfolder(root, category, LAYOUT)):
            name = NAME.fullmatch(path.name)
            if not name or name["category"] != category:
                problems.append(BadFile(path, f"is not named like BUSI's files, '{category} (1).png'"))
            elif name["mask"]:
                masks.setdefault(name["stem"], []).append(path)
            elif name["stem"] in images:
                problems.append(BadFile(path, f"has the same name as {images[name['stem']].image}"))
            else:
                images[name["stem"]] = Item(name["stem"], category, path, ())
    items, more = with_masks(images, masks)
    return ImageFiles("busi", root, items.values(), problems + more)
