"""TN3K: thyroid, 3493 images: 2879 for training and validation, 614 for testing.

Gong, Chen, Wang, Xie, Mao, Yu, Chen, Li, "Multi-task learning for thyroid nodule segmentation with thyroid region
prior", ISBI 2021, 257-261. The classes: Gong, Cheng, Xie, Tan, Chen, Chen, Li, "Less is more: adaptive curriculum
learning for thyroid nodule diagnosis", MICCAI 2022, 248-257.
"""

import re
from pathlib import Path

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import by_name, images_in, paired, subfolder
from mgcc_dist.data.readers.lists import ZERO_OR_ONE, classified, number_in, read_list
from mgcc_dist.data.readers.reader import ImageFiles, Item

LAYOUT = "trainval-image/, trainval-mask/, test-image/, test-mask/"


def tn3k(root: Path) -> ImageFiles:
    """TN3K: `trainval-image/0000.jpg`, `trainval-mask/`, `test-image/`, `test-mask/`; keys are `trainval-0000`, ...

    `label4trainval.csv` and `label4test.csv` (rows of file name and 0 for benign or 1 for malignant, no title row) give
    the classes; without them they are unknown. The folds (`tn3k-trainval-fold0.json`, ...) are not read: make a split
    file with `split`. No patient ids.

    Raises:
        UserError: the root or a folder is not there or holds no image, or a list cannot be read.
    """
    problems: list[BadFile] = []
    items: list[Item] = []
    lists: list[Path] = []
    notes: list[str] = []
    stem = re.compile(r"(?P<name>\d+)")
    for part in ("trainval", "test"):
        images = by_name(images_in(subfolder(root, f"{part}-image", LAYOUT)), stem, "0000.jpg", problems)
        masks = by_name(images_in(subfolder(root, f"{part}-mask", LAYOUT)), stem, "0000.jpg", problems)
        found = paired(images, masks, problems, prefix=f"{part}-")
        path = root / f"label4{part}.csv"
        if not path.is_file():
            items += found.values()
            continue
        table = read_list(path, ("file name", "class"), number_in, header=False)
        items += classified(found, table, "class", ZERO_OR_ONE, problems)
        notes += table.without_image(images)
        lists.append(path)
    return ImageFiles("tn3k", root, items, problems, lists, notes)
