"""Whose image a file of one's own dataset is: by its folder, by a pattern in its name, or by a list."""

import re
from collections.abc import Callable
from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.file_listing import readable_name
from mgcc_dist.data.images import SUFFIXES, BadFile
from mgcc_dist.data.readers.lists import read_list

SUBFOLDER = "subfolder"
COLUMNS = ("image", "patient")

PatientOf = Callable[[Path, str], str]
"""Returns the patient of an image from its path and its name (relative to images/, without suffix); raises BadFile."""


def is_list(source: str) -> bool:
    """Return whether `--patient` names a list, and not a regular expression."""
    return source.lower().endswith((".csv", ".xlsx"))


def patient_reader(source: str) -> PatientOf:
    """Return how to find an image's patient.

    Args:
        source: "subfolder", the path of a list (CSV or .xlsx) with the columns image and patient, or a regular
            expression for the file name whose first group is the patient.

    Raises:
        UserError: the list cannot be read, or the expression is invalid or has no group.
    """
    if source == SUBFOLDER:
        return _by_subfolder
    if is_list(source):
        return _by_list(Path(source))
    try:
        pattern = re.compile(source)
    except re.error as error:
        raise UserError(f"--patient {source}: not a regular expression ({error})") from error
    if not pattern.groups:
        raise UserError(f"--patient {source}: has no group. Put the patient into parentheses, as in '(case_[0-9]+)_'.")
    return lambda image, name: _by_pattern(pattern, image, name)


def _by_subfolder(image: Path, name: str) -> str:
    folder = name.rpartition("/")[0]
    if not folder:
        raise BadFile(image, "is not in the folder of a patient")
    return folder.rpartition("/")[2]


def _by_pattern(pattern: re.Pattern[str], image: Path, name: str) -> str:
    match = pattern.search(name.rpartition("/")[2])
    if not match or not match[1]:
        raise BadFile(image, f"its name does not match --patient {pattern.pattern}")
    return match[1]


def _by_list(path: Path) -> PatientOf:
    if not path.is_file():
        raise UserError(f"--patient {path}: does not exist")
    table = read_list(path, COLUMNS, _without_suffix)
    if table.bad_files:
        raise UserError(f"{table.bad_files[0]}. List each image once.")

    def patient(image: Path, name: str) -> str:
        listed = name if name in table.rows else name.rpartition("/")[2]
        return table.value(image, listed, COLUMNS[1])

    return patient


def _without_suffix(text: str) -> str:
    text = readable_name(text.replace("\\", "/"))
    return text[: -len(Path(text).suffix)] if text.lower().endswith(SUFFIXES) else text
