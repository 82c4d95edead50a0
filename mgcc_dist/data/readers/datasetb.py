"""Dataset B, also called UDIAT: breast, 163 images.

Yap, Pons, Martí, Ganau, Sentís, Zwiggelaar, Davison, Martí, "Automated breast ultrasound lesions detection using
convolutional neural networks", IEEE Journal of Biomedical and Health Informatics 22 (2018) 1218-1226.
"""

from pathlib import Path

from mgcc_dist.data.readers.lists import BENIGN_OR_MALIGNANT, numbered_images
from mgcc_dist.data.readers.reader import ImageFileReader


def datasetb(root: Path) -> ImageFileReader:
    """Dataset B (UDIAT): `original/000001.png`, `GT/000001.png`, `DatasetB.xlsx` (or DatasetB.csv).

    The list's columns are Image (the number) and Type (Benign or Malignant). No patient ids. Reading the workbook needs
    the extra `readers`.

    Raises:
        UserError: the root, a folder or the list does not exist or is empty.
    """
    folders = ("original", "GT")
    return numbered_images(
        "datasetb", root, folders, "000001.png", "DatasetB.xlsx", ("Image", "Type"), BENIGN_OR_MALIGNANT
    )
