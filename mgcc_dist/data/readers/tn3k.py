"""TN3K: thyroid, 3493 images: 2879 for training and validation, 614 for testing.

Gong, Chen, Wang, Xie, Mao, Yu, Chen, Li, "Multi-task learning for thyroid nodule segmentation with thyroid region
prior", ISBI 2021, 257-261. The classes: Gong, Cheng, Xie, Tan, Chen, Chen, Li, "Less is more: adaptive curriculum
learning for thyroid nodule diagnosis", MICCAI 2022, 248-257.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import find_images, index_by_name, pair_with_masks, require_subfolder
from mgcc_dist.data.readers.lists import ZERO_OR_ONE, assign_classes, image_number, read_list
from mgcc_dist.data.readers.reader import ImageFileReader, ImageItem
from mgcc_dist.data.splits import TEST

FOLD_FILE = re.compile(r"tn3k-trainval-fold\d\.json")
LAYOUT = "trainval-image/, trainval-mask/, test-image/, test-mask/"
STEM = re.compile(r"(?P<name>\d+)")


def tn3k(root: Path) -> ImageFileReader:
    """TN3K: `trainval-image/0000.jpg`, `trainval-mask/`, `test-image/`, `test-mask/`; keys are `trainval-0000`, ...

    `label4trainval.csv` and `label4test.csv` (rows of file name and 0 for benign or 1 for malignant, no header) give
    the classes; without them all classes are unknown. The published folds (`tn3k-trainval-fold0.json`, ...) are read if
    they are there, for `split --published-folds`. No patient ids.

    Raises:
        UserError: the root or a folder does not exist or has no images, or a list cannot be read.
    """
    bad_files: list[BadFile] = []
    items: list[ImageItem] = []
    lists: list[Path] = []
    notes: list[str] = []
    for part in ("trainval", "test"):
        image_files = find_images(require_subfolder(root, f"{part}-image", LAYOUT))
        mask_files = find_images(require_subfolder(root, f"{part}-mask", LAYOUT))
        images = index_by_name(image_files, STEM, "0000.jpg", bad_files)
        masks = index_by_name(mask_files, STEM, "0000.jpg", bad_files)
        paired = pair_with_masks(images, masks, bad_files, prefix=f"{part}-")
        path = root / f"label4{part}.csv"
        if not path.is_file():
            items += paired.values()
            continue
        table = read_list(path, ("file name", "class"), image_number, header=False)
        items += assign_classes(paired, table, "class", ZERO_OR_ONE, bad_files)
        notes += table.note_missing_images(images)
        lists.append(path)
    fold_files = sorted(path for path in root.iterdir() if FOLD_FILE.fullmatch(path.name))
    fold_of = {number: path.stem[-1] for path in fold_files for number in _read_fold(path)}
    if fold_files:
        for index, item in enumerate(items):
            part, _, number = item.key.partition("-")
            items[index] = replace(item, fold=TEST if part == "test" else fold_of.get(int(number)))
    return ImageFileReader("tn3k", root, items, bad_files, lists + fold_files, notes)


def _read_fold(path: Path) -> list[int]:
    """Return the numbers of the validation images of a published fold.

    Raises:
        UserError: the file is not JSON or has no such list.
    """
    try:
        numbers = json.loads(path.read_text())["val"]
        return [int(number) for number in numbers]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a fold of TN3K, with a list 'val' ({error!r}). Download it again.") from error
