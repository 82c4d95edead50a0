"""BUS-BRA: breast, 1875 images of 1064 patients.

Gómez-Flores, Gregorio-Calas, Coelho de Albuquerque Pereira, "BUS-BRA: A breast ultrasound dataset for assessing
computer-aided diagnosis systems", Medical Physics 51 (2024) 3110-3123.
"""

import re
from dataclasses import replace
from pathlib import Path

from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import by_name, images_in, paired, subfolder
from mgcc_dist.data.readers.lists import BENIGN_OR_MALIGNANT, read_list, required_list
from mgcc_dist.data.readers.reader import ImageFiles

LAYOUT = "Images/, Masks/, bus_data.csv"


def busbra(root: Path) -> ImageFiles:
    """BUS-BRA: `Images/bus_ID.png`, `Masks/mask_ID.png`, `bus_data.csv`; grouped by patient.

    The list's columns are ID (`bus_ID`), Case (the patient) and Pathology (the class). Images without a row are
    problems; rows without an image are a note, so that a part of the data set can be converted.

    Raises:
        UserError: the root, a folder or the list is not there or holds nothing to read.
    """
    problems: list[BadFile] = []
    stems = (re.compile(r"bus_(?P<name>.+)"), re.compile(r"mask_(?P<name>.+)"))
    images = by_name(images_in(subfolder(root, "Images", LAYOUT)), stems[0], "bus_0001-l.png", problems)
    masks = by_name(images_in(subfolder(root, "Masks", LAYOUT)), stems[1], "mask_0001-l.png", problems)
    table = read_list(required_list(root, "bus_data", LAYOUT), ("ID", "Case", "Pathology"))
    items = []
    for item in paired(images, masks, problems).values():
        try:
            category = table.category(item.image, item.key, "Pathology", BENIGN_OR_MALIGNANT)
            patient = f"patient-{table.value(item.image, item.key, 'Case')}"
            items.append(replace(item, category=category, patient=patient))
        except BadFile as bad:
            problems.append(bad)
    notes = table.without_image([image.stem for image in images.values()])
    return ImageFiles("busbra", root, items, problems + table.problems, [table.path], notes)
