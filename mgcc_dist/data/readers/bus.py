"""BUS, also called BUSIS: breast, 562 images.

Zhang, Xian, Cheng, Shareef, Ding, Xu, Huang, Zhang, Ning, Wang, "BUSIS: A benchmark for breast ultrasound image
segmentation", Healthcare 10 (2022) 729.
"""

import re
from pathlib import Path

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import by_name, images_in, paired, subfolder
from mgcc_dist.data.readers.lists import classified, find_list, number_in, read_list
from mgcc_dist.data.readers.reader import ImageFiles

LAYOUT = "Original/, GT/"
CLASSES = {"b": "benign", "m": "malignant"}


def bus(root: Path) -> ImageFiles:
    """BUS (BUSIS): `Original/caseN.*`, `GT/caseN_GT.*` and, where it came with them, the list `BUSIS562.csv`.

    The list (or BUSIS562.xlsx, BUSIS.csv, BUSIS.xlsx) has the columns "img name" (caseN, with zeros or without) and
    "tumor type" (B or M); without it all classes are unknown. No patient ids.

    Raises:
        UserError: the root or a folder is not there or holds no image, or the list cannot be read.
    """
    problems: list[BadFile] = []
    stems = (re.compile(r"case(?P<name>\d+)"), re.compile(r"case(?P<name>\d+)_GT"))
    images = by_name(images_in(subfolder(root, "Original", LAYOUT)), stems[0], "case1.bmp", problems)
    masks = by_name(images_in(subfolder(root, "GT", LAYOUT)), stems[1], "case1_GT.bmp", problems)
    items = paired(images, masks, problems)
    path = find_list(root, ("BUSIS562", "BUSIS"))
    if path is None:
        return ImageFiles("bus", root, items.values(), problems)
    table = read_list(path, ("img name", "tumor type"), number_in)
    classed = classified(items, table, "tumor type", CLASSES, problems)
    return ImageFiles("bus", root, classed, problems, [path], table.without_image(images))
