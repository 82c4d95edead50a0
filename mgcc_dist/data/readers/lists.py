"""Lists that come with datasets: a CSV file or an Excel workbook (.xlsx) with one row per image.

Of a workbook only the first sheet is read.
"""

import csv
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import (
    find_images,
    image_name,
    index_by_name,
    pair_with_masks,
    require_root,
    require_subfolder,
)
from mgcc_dist.data.readers.reader import ImageFileReader, ImageItem

BENIGN_OR_MALIGNANT = {"benign": "benign", "malignant": "malignant"}
ZERO_OR_ONE = {"0": "benign", "1": "malignant"}
NUMBER = re.compile(r"(?P<name>\d+)")


@dataclass(frozen=True)
class ImageList:
    """The rows of a list by image name; names listed twice are in `bad_files`."""

    path: Path
    rows: dict[str, dict[str, str]]
    bad_files: list[BadFile]

    def value(self, image: Path, name: str, column: str) -> str:
        """Return a column of the image's row. Raises BadFile if the row or the value is missing."""
        if name not in self.rows:
            raise BadFile(image, f"has no row in {self.path.name}")
        if not self.rows[name][column]:
            raise BadFile(image, f"has no {column!r} in {self.path.name}")
        return self.rows[name][column]

    def category(self, image: Path, name: str, column: str, classes: Mapping[str, str]) -> str:
        """Map a column of the image's row, in lower case, to its class. Raises BadFile if it is not in `classes`."""
        value = self.value(image, name, column)
        if value.lower() not in classes:
            raise BadFile(image, f"has {column} {value!r} in {self.path.name}, not {' or '.join(classes)}")
        return classes[value.lower()]

    def note_missing_images(self, names: Collection[str]) -> list[str]:
        """Return a note if some rows have no image, as in a subset of the dataset; else an empty list."""
        missing = sorted(set(self.rows) - set(names))
        if not missing:
            return []
        return [
            f"{self.path.name}: {len(missing)} of the {len(self.rows)} images are missing (the first is "
            f"{missing[0]!r}). Converted the others."
        ]


def image_number(text: str) -> str:
    """Return the name of an image listed by number: "case001", "000001.png" and 1 are "1"; other text is unchanged."""
    match = re.fullmatch(r"\D*(\d+)(\.\w+)?", text)
    return image_name(match[1]) if match else text


def find_list(root: Path, stems: Sequence[str]) -> Path | None:
    """Return the first of `stems` that exists in the root as .csv or .xlsx."""
    require_root(root)
    paths = [root / f"{stem}{suffix}" for stem in stems for suffix in (".csv", ".xlsx")]
    return next((path for path in paths if path.is_file()), None)


def require_list(root: Path, stem: str, layout: str) -> Path:
    """Return the list `stem` of the root; `layout` lists what the root should contain, for the message.

    Raises:
        UserError: the root or the list does not exist.
    """
    path = find_list(root, (stem,))
    if path is None:
        raise UserError(f"{root}: has no {stem}.csv or {stem}.xlsx. Set --root to the folder that contains {layout}.")
    return path


def read_list(
    path: Path, columns: Sequence[str], name_of: Callable[[str], str] = str, header: bool = True
) -> ImageList:
    """Read the given columns, the first of which names the image; without a `header` they are the file's first columns.

    Rows without a name are skipped. Of rows with the same name the first is used.

    Raises:
        UserError: the file is not readable, a column is missing, or the `readers` extra is not installed.
    """
    table = _read_workbook(path) if path.suffix == ".xlsx" else _read_csv(path)
    first = (table.pop(0) if table else []) if header else columns
    titles = [title.strip() for title in first]
    if missing := [column for column in columns if column not in titles]:
        raise UserError(f"{path}: has no column {missing[0]!r}, only {', '.join(titles)}")
    column_index = {column: titles.index(column) for column in columns}
    rows: dict[str, dict[str, str]] = {}
    bad_files = []
    for cells in table:
        row = {column: cells[i].strip() if i < len(cells) else "" for column, i in column_index.items()}
        name = name_of(row[columns[0]])
        if name in rows:
            bad_files.append(BadFile(path, f"lists {row[columns[0]]!r} twice"))
        elif name:
            rows[name] = row
    return ImageList(path, rows, bad_files)


def assign_classes(
    items: Mapping[str, ImageItem],
    table: ImageList,
    column: str,
    classes: Mapping[str, str],
    bad_files: list[BadFile],
) -> list[ImageItem]:
    """Return the items with their classes from the list; items without one and the list's errors go to `bad_files`."""
    classified = []
    for name, item in items.items():
        try:
            classified.append(replace(item, category=table.category(item.image, name, column, classes)))
        except BadFile as bad:
            bad_files.append(bad)
    bad_files += table.bad_files
    return classified


def numbered_images(
    name: str,
    root: Path,
    folders: tuple[str, str],
    example: str,
    list_file: str,
    columns: tuple[str, str],
    classes: Mapping[str, str],
) -> ImageFileReader:
    """Return the reader of a dataset whose images and masks are numbered, with a list of their classes.

    Args:
        folders: of the images and of the masks.
        example: name of an image and of its mask.
        list_file: its name as published; it may also be .csv or .xlsx instead.
        columns: the image's number, and its class, which `classes` translates.

    Raises:
        UserError: the root, a folder or the list does not exist or is empty.
    """
    layout, bad_files = f"{folders[0]}/, {folders[1]}/, {list_file}", list[BadFile]()
    images, masks = (
        index_by_name(find_images(require_subfolder(root, folder, layout)), NUMBER, example, bad_files)
        for folder in folders
    )
    table = read_list(require_list(root, Path(list_file).stem, layout), columns, image_number)
    items = pair_with_masks(images, masks, bad_files)
    classified = assign_classes(items, table, columns[1], classes, bad_files)
    return ImageFileReader(name, root, classified, bad_files, [table.path], table.note_missing_images(images))


def _read_csv(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable list ({error}). Save it as CSV in UTF-8.") from error


def _read_workbook(path: Path) -> list[list[str]]:
    try:
        import defusedxml  # noqa: F401  # openpyxl parses with it if installed
        import openpyxl
    except ImportError as error:
        raise UserError(f"{path}: reading a workbook needs `pip install 'mgcc-dist[readers]'`") from error
    try:
        sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).worksheets[0]
        rows = list(sheet.iter_rows(values_only=True))
    except Exception as error:  # openpyxl, zipfile and the XML parser raise many types for damaged files
        raise UserError(f"{path}: not a readable list ({error}). Save it as CSV in UTF-8.") from error
    return [["" if value is None else str(value) for value in row] for row in rows]
