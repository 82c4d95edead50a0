"""BUS-BRA: breast, 1875 images of 1064 patients.

Gómez-Flores, Gregorio-Calas, Coelho de Albuquerque Pereira, "BUS-BRA: A breast ultrasound dataset for assessing
computer-aided diagnosis systems", Medical Physics 51 (2024) 3110-3123.
"""

import re
from dataclasses import replace
from pathlib import Path

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import find_images, index_by_name, pair_with_masks, require_subfolder
from mgcc_dist.data.readers.lists import BENIGN_OR_MALIGNANT, read_list, require_list
from mgcc_dist.data.readers.reader import ImageFileReader, with_patients

FOLDS = "5-fold-cv.csv"
LAYOUT = "Images/, Masks/, bus_data.csv"
IMAGE_STEM = re.compile(r"bus_(?P<name>.+)")
MASK_STEM = re.compile(r"mask_(?P<name>.+)")


@with_patients
def busbra(root: Path) -> ImageFileReader:
    """BUS-BRA: `Images/bus_ID.png`, `Masks/mask_ID.png`, `bus_data.csv`; grouped by patient.

    The list's columns are ID (`bus_ID`), Case (the patient), Pathology (the class) and Device (the scanner).
    `5-fold-cv.csv`, if it is there, has the published folds (ID, kFold), for `split --published-folds`. Images without
    a row are bad files; rows without an image are only noted, so that a subset of the dataset can be converted.

    Raises:
        UserError: the root, a folder or the list does not exist or is empty.
    """
    bad_files: list[BadFile] = []
    images = index_by_name(
        find_images(require_subfolder(root, "Images", LAYOUT)), IMAGE_STEM, "bus_0001-l.png", bad_files
    )
    masks = index_by_name(
        find_images(require_subfolder(root, "Masks", LAYOUT)), MASK_STEM, "mask_0001-l.png", bad_files
    )
    table = read_list(require_list(root, "bus_data", LAYOUT), ("ID", "Case", "Pathology", "Device"))
    lists = [table.path]
    folds = None
    if (root / FOLDS).is_file():
        folds = read_list(root / FOLDS, ("ID", "kFold"))
        lists.append(folds.path)
    items = []
    for item in pair_with_masks(images, masks, bad_files).values():
        try:
            category = table.category(item.image, item.key, "Pathology", BENIGN_OR_MALIGNANT)
            patient = f"patient-{table.value(item.image, item.key, 'Case')}"
            fold = folds.value(item.image, item.key, "kFold") if folds else None
            device = table.rows[item.key]["Device"] or None
            items.append(replace(item, category=category, patient=patient, fold=fold, device=device))
        except BadFile as bad:
            bad_files.append(bad)
    notes = table.note_missing_images([image.stem for image in images.values()])
    return ImageFileReader("busbra", root, items, bad_files + table.bad_files, lists, notes)
