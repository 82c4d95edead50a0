"""Dataset B, also called UDIAT: breast, 163 images.

Yap, Pons, Martí, Ganau, Sentís, Zwiggelaar, Davison, Martí, "Automated breast ultrasound lesions detection using
convolutional neural networks", IEEE Journal of Biomedical and Health Informatics 22 (2018) 1218-1226.
"""

import re
from pathlib import Path

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import find_images, index_by_name, pair_with_masks, require_subfolder
from mgcc_dist.data.readers.lists import BENIGN_OR_MALIGNANT, assign_classes, image_number, read_list, require_list
from mgcc_dist.data.readers.reader import ImageFileReader

LAYOUT = "original/, GT/, DatasetB.xlsx"
STEM = re.compile(r"(?P<name>\d+)")


def datasetb(root: Path) -> ImageFileReader:
    """Dataset B (UDIAT): `original/000001.png`, `GT/000001.png`, `DatasetB.xlsx` (or DatasetB.csv).

    The list's columns are Image (the number) and Type (Benign or Malignant). No patient ids. Reading the workbook needs
    the extra `readers`.

    Raises:
        UserError: the root, a folder or the list does not exist or is empty.
    """
    bad_files: list[BadFile] = []
    images = index_by_name(find_images(require_subfolder(root, "original", LAYOUT)), STEM, "000001.png", bad_files)
    masks = index_by_name(find_images(require_subfolder(root, "GT", LAYOUT)), STEM, "000001.png", bad_files)
    table = read_list(require_list(root, "DatasetB", LAYOUT), ("Image", "Type"), image_number)
    items = pair_with_masks(images, masks, bad_files)
    classified = assign_classes(items, table, "Type", BENIGN_OR_MALIGNANT, bad_files)
    return ImageFileReader("datasetb", root, classified, bad_files, [table.path], table.note_missing_images(images))
