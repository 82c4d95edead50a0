"""TN-SCUI 2020: thyroid, the 3644 images of the challenge's training set.

Zhou, Jia, Ni, Noble, Huang, Tan, Van, "Thyroid nodule segmentation and classification in ultrasound images", MICCAI
challenge, 2020, doi 10.5281/zenodo.3715942.
"""

import re
from pathlib import Path

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import find_images, index_by_name, pair_with_masks, require_subfolder
from mgcc_dist.data.readers.lists import ZERO_OR_ONE, assign_classes, image_number, read_list, require_list
from mgcc_dist.data.readers.reader import ImageFileReader

LAYOUT = "image/, mask/, train.csv"
STEM = re.compile(r"(?P<name>\d+)")


def tnscui2020(root: Path) -> ImageFileReader:
    """TN-SCUI 2020's training set: `image/N.PNG`, `mask/N.PNG`, `train.csv`.

    The list's columns are ID (N.PNG or N) and CATE (0 benign, 1 malignant). No patient ids. The challenge's test
    images have no masks: convert them with `folder`.

    Raises:
        UserError: the root, a folder or the list does not exist or is empty.
    """
    bad_files: list[BadFile] = []
    images = index_by_name(find_images(require_subfolder(root, "image", LAYOUT)), STEM, "1.PNG", bad_files)
    masks = index_by_name(find_images(require_subfolder(root, "mask", LAYOUT)), STEM, "1.PNG", bad_files)
    table = read_list(require_list(root, "train", LAYOUT), ("ID", "CATE"), image_number)
    items = pair_with_masks(images, masks, bad_files)
    classified = assign_classes(items, table, "CATE", ZERO_OR_ONE, bad_files)
    return ImageFileReader("tnscui2020", root, classified, bad_files, [table.path], table.note_missing_images(images))
