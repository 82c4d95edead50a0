"""Lists that come with data sets: a CSV file or an Excel workbook (.xlsx) with a row for each image.

Of a workbook the first sheet is read, as far as it is plain text and numbers; workbooks are zipped XML.
"""

import csv
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree.ElementTree import Element

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers import markup
from mgcc_dist.data.readers.layout import existing, image_name
from mgcc_dist.data.readers.reader import Item

BENIGN_OR_MALIGNANT = {"benign": "benign", "malignant": "malignant"}
ZERO_OR_ONE = {"0": "benign", "1": "malignant"}
MOST = 64 * 2**20  # bytes unpacked: no list is longer, and a small workbook could unpack to anything


@dataclass(frozen=True)
class ImageList:
    """The rows of the list in `path` by the names of their images; names listed twice are in `problems`."""

    path: Path
    rows: dict[str, dict[str, str]]
    problems: list[BadFile]

    def value(self, image: Path, name: str, column: str) -> str:
        """What the row of the image says in a column. Raises BadFile where there is none or nothing."""
        if name not in self.rows:
            raise BadFile(image, f"has no row in {self.path.name}")
        if not self.rows[name][column]:
            raise BadFile(image, f"has no {column!r} in {self.path.name}")
        return self.rows[name][column]

    def category(self, image: Path, name: str, column: str, known: Mapping[str, str]) -> str:
        """The class that the value (in lower case) stands for. Raises BadFile where it is not known."""
        value = self.value(image, name, column)
        if value.lower() not in known:
            raise BadFile(image, f"has {column} {value!r} in {self.path.name}, not {' or '.join(known)}")
        return known[value.lower()]

    def without_image(self, names: Collection[str]) -> list[str]:
        """A note on the rows whose images are not there, as in a part of the data set; empty where all are."""
        missing = sorted(set(self.rows) - set(names))
        if not missing:
            return []
        return [
            f"{len(missing)} of the {len(self.rows)} images in {self.path.name} are not there, "
            f"{missing[0]!r} first: converted what is"
        ]


def number_in(text: str) -> str:
    """The name of an image listed by number: "case001", "000001.png" and 1 are all "1"; other text as it is."""
    match = re.fullmatch(r"\D*(\d+)(\.\w+)?", text)
    return image_name(match[1]) if match else text


def find_list(root: Path, stems: Sequence[str]) -> Path | None:
    """The first of `stems` that the root holds as .csv or, failing that, as .xlsx."""
    existing(root)
    paths = [root / f"{stem}{suffix}" for stem in stems for suffix in (".csv", ".xlsx")]
    return next((path for path in paths if path.is_file()), None)


def required_list(root: Path, stem: str, layout: str) -> Path:
    """The list of that stem in the root, which is said to hold `layout`.

    Raises:
        UserError: it is not there.
    """
    path = find_list(root, (stem,))
    if path is None:
        raise UserError(f"{root} has no {stem}.csv or {stem}.xlsx; --root is the folder that holds {layout}")
    return path


def read_list(
    path: Path, columns: Sequence[str], name_of: Callable[[str], str] = str, header: bool = True
) -> ImageList:
    """Read the columns, the first of which names the image; without a `header` they are the first ones of the file.

    Rows without a name are none of an image. Where a name comes twice the first row counts.

    Raises:
        UserError: not readable as such a file, or a column is missing.
    """
    try:
        table = _excel_rows(path) if path.suffix == ".xlsx" else _csv_rows(path)
    except (csv.Error, ValueError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not a readable list ({error}); save it as CSV in UTF-8") from error
    first = (table.pop(0) if table else []) if header else columns
    titles = [title.strip() for title in first]
    if missing := [column for column in columns if column not in titles]:
        raise UserError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(titles)}")
    places = {column: titles.index(column) for column in columns}
    rows: dict[str, dict[str, str]] = {}
    problems = []
    for cells in table:
        row = {column: cells[place].strip() if place < len(cells) else "" for column, place in places.items()}
        name = name_of(row[columns[0]])
        if name in rows:
            problems.append(BadFile(path, f"lists {row[columns[0]]!r} twice"))
        elif name:
            rows[name] = row
    return ImageList(path, rows, problems)


def classified(
    items: Mapping[str, Item], table: ImageList, column: str, known: Mapping[str, str], problems: list[BadFile]
) -> list[Item]:
    """The items by name, with the classes of the list; those that have none, and its problems, go to `problems`."""
    classed = []
    for name, item in items.items():
        try:
            classed.append(replace(item, category=table.category(item.image, name, column, known)))
        except BadFile as bad:
            problems.append(bad)
    problems += table.problems
    return classed


def _csv_rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file, strict=True))


def _excel_rows(path: Path) -> list[list[str]]:
    with zipfile.ZipFile(path) as book:
        sheet = _part(book, "xl/worksheets/sheet1.xml")
        shared = []
        if "xl/sharedStrings.xml" in book.namelist():
            shared = [_text(entry) for entry in _part(book, "xl/sharedStrings.xml").iter("si")]
    return [_cells(row, shared) for row in sheet.iter("row")]


def _part(book: zipfile.ZipFile, name: str) -> Element:
    if book.getinfo(name).file_size > MOST:
        raise ValueError(f"its {name} is over {MOST} bytes")
    return markup.parse(book.read(name))


def _cells(row: Element, shared: list[str]) -> list[str]:
    """The row's texts in their places; Excel leaves out empty cells."""
    cells: dict[int, str] = {}
    for cell in row.iter("c"):
        place = 0
        for letter in re.sub(r"\d", "", cell.get("r", "")):
            place = place * 26 + ord(letter) - ord("A") + 1
        if not 0 < place <= 2**14:
            raise ValueError(f"its cell {cell.get('r')!r} is nowhere")
        value = cell.findtext("v", "")
        if cell.get("t") == "s":
            value = shared[int(value)] if int(value) < len(shared) else ""
        cells[place] = _text(cell) if cell.get("t") == "inlineStr" else value
    return [cells.get(place, "") for place in range(1, max(cells, default=0) + 1)]


def _text(element: Element) -> str:
    return "".join(part.text or "" for part in element.iter("t"))
