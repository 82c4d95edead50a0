"""BUS, also called BUSIS: breast, 562 images.

Zhang, Xian, Cheng, Shareef, Ding, Xu, Huang, Zhang, Ning, Wang, "BUSIS: A benchmark for breast ultrasound image
segmentation", Healthcare 10 (2022) 729.
"""

import re
from pathlib import Path

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import find_images, index_by_name, pair_with_masks, require_subfolder
from mgcc_dist.data.readers.lists import assign_classes, find_list, image_number, read_list
from mgcc_dist.data.readers.reader import ImageFileReader

LAYOUT = "Original/, GT/"
CLASSES = {"b": "benign", "m": "malignant"}
IMAGE_STEM = re.compile(r"case(?P<name>\d+)")
MASK_STEM = re.compile(r"case(?P<name>\d+)_GT")


def bus(root: Path) -> ImageFileReader:
    """BUS (BUSIS): `Original/caseN.*`, `GT/caseN_GT.*` and optionally the list `BUSIS562.csv`.

    The list (or BUSIS562.xlsx, BUSIS.csv, BUSIS.xlsx) has the columns "img name" (caseN, with or without leading zeros)
    and "tumor type" (B or M). Without it all classes are unknown. No patient ids.

    Raises:
        UserError: the root or a folder does not exist or has no images, or the list cannot be read.
    """
    bad_files: list[BadFile] = []
    images = index_by_name(find_images(require_subfolder(root, "Original", LAYOUT)), IMAGE_STEM, "case1.bmp", bad_files)
    masks = index_by_name(find_images(require_subfolder(root, "GT", LAYOUT)), MASK_STEM, "case1_GT.bmp", bad_files)
    items = pair_with_masks(images, masks, bad_files)
    path = find_list(root, ("BUSIS562", "BUSIS"))
    if path is None:
        return ImageFileReader("bus", root, items.values(), bad_files)
    table = read_list(path, ("img name", "tumor type"), image_number)
    classified = assign_classes(items, table, "tumor type", CLASSES, bad_files)
    return ImageFileReader("bus", root, classified, bad_files, [path], table.note_missing_images(images))
