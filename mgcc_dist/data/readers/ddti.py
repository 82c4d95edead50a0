"""DDTI: thyroid, 480 images of 390 cases, with outlines.

Pedraza, Vargas, Narváez, Durán, Muñoz, Romero, "An open access thyroid ultrasound image database", Proc. SPIE 9287
(2015) 92870W.

`N.xml` gives the TI-RADS class of case N and has a mark for each outlined image M:

    <mark><image>M</image><svg>[{"points": [{"x": 137, "y": 78}, ...], "regionType": "freehand"}, ...]</svg></mark>

The mask is the union of all regions of all marks of the image. A region with fewer than three points encloses nothing.
Some marks are empty and some are truncated (197.xml and 205.xml as published). Such images count as bad files instead
of unlabeled images: their outlines may be lost, and a split needs masks for all images.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from PIL import Image, ImageDraw

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.layout import find_images, image_name, require_root
from mgcc_dist.data.readers.reader import ImageFileReader, ImageItem, with_patients

Outline = list[tuple[float, float]]  # x, y in pixels from the top left

NAME = re.compile(r"(?P<case>\d+)_(?P<number>\d+)")
TIRADS = ("2", "3", "4a", "4b", "4c", "5")
MAX_COORDINATE = 1e5  # pixels; larger than any image


@with_patients
def ddti(root: Path) -> ImageFileReader:
    """DDTI: `N_M.jpg` and `N.xml` in one folder; the outlines in the XML become the mask; grouped by patient (N).

    Classes are tirads_2, tirads_3, tirads_4a, tirads_4b, tirads_4c, tirads_5, or unknown if the file has none. Images
    without a readable outline are bad files. XML files and marks without their image are only noted, so that a subset
    of the dataset can be converted. Needs the extra `readers`.

    Raises:
        UserError: the root does not exist or has no images or no XML files, or defusedxml is not installed.
    """
    require_root(root)
    images = find_images(root)
    xml_files = sorted(path for path in root.rglob("*.xml") if not path.name.startswith("."))
    if not xml_files:
        raise UserError(f"{root}: has no XML files. Set --root to the folder that contains 1_1.jpg, 1.xml, ...")
    cases = {path: _read_case(path) for path in xml_files}
    bad_files: list[BadFile] = []
    items: list[ImageItem] = []
    outlines: dict[str, list[Outline]] = {}
    unused_marks = {(path, number) for path, case in cases.items() for number in case.marks}
    for image in images:
        name = NAME.fullmatch(image.stem)
        if not name:
            bad_files.append(BadFile(image, "is not named like this data set's files, '1_1.jpg'"))
            continue
        path, number = image.parent / f"{name['case']}.xml", image_name(name["number"])
        unused_marks.discard((path, number))
        if path not in cases:
            bad_files.append(BadFile(image, f"there is no {path.name} next to it"))
        elif error := cases[path].error or cases[path].marks.get(number, Mark()).error:
            bad_files.append(BadFile(image, f"cannot read its outline from {path.name}: {error}"))
        else:
            items.append(ImageItem(image.stem, cases[path].category, image, (), f"patient-{name['case']}"))
            outlines[image.stem] = cases[path].marks[number].outlines
    notes = []
    if unused_marks:
        file, number = min((path.name, number) for path, number in unused_marks)
        notes = [
            f"{len(unused_marks)} outlined images are missing (the first is {number} of {file}). Converted the others."
        ]
    return OutlineReader(root, items, outlines, bad_files, xml_files, notes)


class OutlineReader(ImageFileReader):
    """Reader of DDTI's images; draws the masks on access."""

    def __init__(
        self,
        root: Path,
        items: list[ImageItem],
        outlines: Mapping[str, list[Outline]],
        bad_files: list[BadFile],
        lists: list[Path],
        notes: list[str],
    ) -> None:
        super().__init__("ddti", root, items, bad_files, lists, notes)
        self.outlines = outlines

    def mask(self, item: ImageItem, width: int, height: int) -> np.ndarray:
        mask = Image.new("L", (width, height))
        for outline in self.outlines[item.key]:
            ImageDraw.Draw(mask).polygon(outline, fill=255, outline=255)
        return np.asarray(mask)


@dataclass
class Mark:
    """The outlines of an image, or why they cannot be used; a mark without outlines is an error."""

    outlines: list[Outline] = field(default_factory=list)
    error: str = "it has no outline of this image"


@dataclass
class Case:
    """The content of an XML file: class and marks by image number, or why it cannot be used."""

    category: str = "unknown"
    marks: dict[str, Mark] = field(default_factory=dict)
    error: str = ""


def _read_case(path: Path) -> Case:
    try:
        root = _parse_xml(path)
    except ValueError as error:
        return Case(error=str(error))
    tirads = root.findtext(".//tirads", "").strip().lower()
    if tirads and tirads not in TIRADS:
        return Case(error=f"its tirads is {tirads!r}, not {', '.join(TIRADS)} or empty")
    case = Case(f"tirads_{tirads}" if tirads else "unknown")
    for element in root.iter("mark"):
        number = image_name(element.findtext("image", "").strip())
        regions = element.findtext("svg", "").strip()
        if not regions:
            continue
        if not number:
            return Case(error="it has a mark without an image number")
        mark = case.marks.setdefault(number, Mark())
        try:
            mark.outlines += _parse_outlines(regions)
            if mark.outlines and mark.error == Mark.error:
                mark.error = ""
        except ValueError as error:
            mark.error = str(error)
    return case


def _parse_xml(path: Path) -> Element:
    """Parse a file without entities or external references, which downloaded XML could abuse.

    Raises:
        UserError: defusedxml is not installed.
        ValueError: not well-formed, or has a document type declaration.
    """
    try:
        from defusedxml.ElementTree import fromstring
    except ImportError as error:
        raise UserError(f"{path}: reading XML needs `pip install 'mgcc-dist[readers]'`") from error
    try:
        return fromstring(path.read_bytes(), forbid_dtd=True)
    except (ParseError, ValueError, LookupError) as error:  # LookupError: unknown encoding
        raise ValueError(f"not readable XML ({error})") from error


def _parse_outlines(regions: str) -> list[Outline]:
    """Parse the regions of a mark; drop those that enclose nothing.

    Raises:
        ValueError: not JSON (usually truncated), or not the list of regions described above.
    """
    try:
        outlines = [
            [(float(point["x"]), float(point["y"])) for point in region["points"]] for region in json.loads(regions)
        ]
    except json.JSONDecodeError as error:
        raise ValueError(f"an outline is truncated or not JSON ({error})") from error
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"an outline is not a list of points ({error!r})") from error
    if not all(abs(value) < MAX_COORDINATE for outline in outlines for point in outline for value in point):
        raise ValueError("an outline has a point far outside of any image")
    return [outline for outline in outlines if len(outline) >= 3]
