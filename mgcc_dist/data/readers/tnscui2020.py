"""TN-SCUI 2020: thyroid, the 3644 images of the challenge's training set.

Zhou, Jia, Ni, Noble, Huang, Tan, Van, "Thyroid nodule segmentation and classification in ultrasound images", MICCAI
challenge, 2020, doi 10.5281/zenodo.3715942.
"""

from pathlib import Path

from mgcc_dist.data.readers.lists import ZERO_OR_ONE, numbered_images
from mgcc_dist.data.readers.reader import ImageFileReader


def tnscui2020(root: Path) -> ImageFileReader:
    """TN-SCUI 2020's training set: `image/N.PNG`, `mask/N.PNG`, `train.csv`.

    The list's columns are ID (N.PNG or N) and CATE (0 benign, 1 malignant). No patient ids. The challenge's test
    images have no masks: convert them with `folder`.

    Raises:
        UserError: the root, a folder or the list does not exist or is empty.
    """
    folders = ("image", "mask")
    return numbered_images("tnscui2020", root, folders, "1.PNG", "train.csv", ("ID", "CATE"), ZERO_OR_ONE)
