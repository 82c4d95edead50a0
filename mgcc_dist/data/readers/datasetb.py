"""Dataset B, also called UDIAT: breast, 163 images.

Yap, Pons, Martí, Ganau, Sentís, Zwiggelaar, Davison, Martí, "Automated breast ultrasound lesions detection using
convolutional neural networks", IEEE Journal of Biomedical and Health Informatics 22 (2018) 1218-1226.
"""

import re
from pathlib import Path

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import by_name, images_in, paired, subfolder
from mgcc_dist.data.readers.lists import BENIGN_OR_MALIGNANT, classified, number_in, read_list, required_list
from mgcc_dist.data.readers.reader import ImageFiles

LAYOUT = "original/, GT/, DatasetB.xlsx"


def datasetb(root: Path) -> ImageFiles:
    """Dataset B (UDIAT): `original/000001.png`, `GT/000001.png`, `DatasetB.xlsx` (or the same as DatasetB.csv).

    The list's columns are Image (the number) and Type (Benign or Malignant). No patient ids.

    Raises:
        UserError: the root, a folder or the list is not there or holds nothing to read.
    """
    problems: list[BadFile] = []
    stem = re.compile(r"(?P<name>\d+)")
    images = by_name(images_in(subfolder(root, "original", LAYOUT)), stem, "000001.png", problems)
    masks = by_name(images_in(subfolder(root, "GT", LAYOUT)), stem, "000001.png", problems)
    table = read_list(required_list(root, "DatasetB", LAYOUT), ("Image", "Type"), number_in)
    items = paired(images, masks, problems)
    classed = classified(items, table, "Type", BENIGN_OR_MALIGNANT, problems)
    return ImageFiles("datasetb", root, classed, problems, [table.path], table.without_image(images))
