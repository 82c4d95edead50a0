"""TN-SCUI 2020: thyroid, the 3644 images of the challenge's training set.

Zhou, Jia, Ni, Noble, Huang, Tan, Van, "Thyroid nodule segmentation and classification in ultrasound images", MICCAI
challenge, 2020, doi 10.5281/zenodo.3715942.
"""

import re
from pathlib import Path

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import by_name, images_in, paired, subfolder
from mgcc_dist.data.readers.lists import ZERO_OR_ONE, classified, number_in, read_list, required_list
from mgcc_dist.data.readers.reader import ImageFiles

LAYOUT = "image/, mask/, train.csv"


def tnscui2020(root: Path) -> ImageFiles:
    """TN-SCUI 2020's training set: `image/N.PNG`, `mask/N.PNG`, `train.csv`.

    The list's columns are ID (N.PNG or N) and CATE (0 benign, 1 malignant). No patient ids. The challenge's test
    images have no masks: convert them with `folder`.

    Raises:
        UserError: the root, a folder or the list is not there or holds nothing to read.
    """
    problems: list[BadFile] = []
    stem = re.compile(r"(?P<name>\d+)")
    images = by_name(images_in(subfolder(root, "image", LAYOUT)), stem, "1.PNG", problems)
    masks = by_name(images_in(subfolder(root, "mask", LAYOUT)), stem, "1.PNG", problems)
    table = read_list(required_list(root, "train", LAYOUT), ("ID", "CATE"), number_in)
    items = paired(images, masks, problems)
    classed = classified(items, table, "CATE", ZERO_OR_ONE, problems)
    return ImageFiles("tnscui2020", root, classed, problems, [table.path], table.without_image(images))
