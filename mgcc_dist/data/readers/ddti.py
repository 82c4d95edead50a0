"""DDTI: thyroid, 480 images of 390 cases, outlined.

Pedraza, Vargas, Narváez, Durán, Muñoz, Romero, "An open access thyroid ultrasound image database", Proc. SPIE 9287
(2015) 92870W.

`N.xml` says of case N the TI-RADS class and holds for each outlined image M a mark:

    <mark><image>M</image><svg>[{"points": [{"x": 137, "y": 78}, ...], "regionType": "freehand"}, ...]</svg></mark>

The mask is the union of all regions of all marks of the image. A region of fewer than three points encloses nothing.
Some marks are empty and some are cut off in the middle (197.xml and 205.xml as published). Such images are problems and
not unlabeled images: nobody can say whether their outlines are lost, and a split needs masks of all images.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers import markup
from mgcc_dist.data.readers.layout import existing, image_name, images_in
from mgcc_dist.data.readers.reader import ImageFiles, Item

Outline = list[tuple[float, float]]  # x, y in pixels from the top left

NAME = re.compile(r"(?P<case>\d+)_(?P<number>\d+)")
TIRADS = ("2", "3", "4a", "4b", "4c", "5")
FARTHEST = 1e5  # pixels: no image is as large, so a point beyond is no place in it


def ddti(root: Path) -> ImageFiles:
    """DDTI: `N_M.jpg` and `N.xml` in one folder; the outlines in the XML become the mask; grouped by patient (N).

    Classes are tirads_2, tirads_3, tirads_4a, tirads_4b, tirads_4c, tirads_5, or unknown where the file says nothing.
    Images without an outline, or with one that cannot be read, are problems. XML files and marks without their image
    are a note, so that a part of the data set can be converted.

    Raises:
        UserError: the root is not there or holds no image or no XML file.
    """
    existing(root)
    images = images_in(root)
    lists = sorted(path for path in root.rglob("*.xml") if not path.name.startswith("."))
    if not lists:
        raise UserError(f"{root} has no XML file; --root is the folder that holds 1_1.jpg, 1.xml, ... as published")
    cases = {path: _case(path) for path in lists}
    problems: list[BadFile] = []
    items: list[Item] = []
    outlines: dict[str, list[Outline]] = {}
    unused = {(path, number) for path, case in cases.items() for number in case.marks}
    for image in images:
        name = NAME.fullmatch(image.stem)
        if not name:
            problems.append(BadFile(image, "is not named like the data set's files, '1_1.jpg'"))
            continue
        path, number = image.parent / f"{name['case']}.xml", image_name(name["number"])
        unused.discard((path, number))
        if path not in cases:
            problems.append(BadFile(image, f"has no {path.name} beside it"))
        elif trouble := cases[path].trouble or cases[path].marks.get(number, Mark()).trouble:
            problems.append(BadFile(image, f"cannot get its mask from {path.name}: {trouble}"))
        else:
            items.append(Item(image.stem, cases[path].category, image, (), f"patient-{name['case']}"))
            outlines[image.stem] = cases[path].marks[number].outlines
    notes = []
    if unused:
        first = min((path.name, number) for path, number in unused)
        notes = [f"{len(unused)} outlined images are not there, {first[1]} of {first[0]} first: converted what is"]
    return OutlinedImages(root, items, outlines, problems, lists, notes)


class OutlinedImages(ImageFiles):
    """DDTI's images; the masks are drawn when read."""

    def __init__(
        self,
        root: Path,
        items: list[Item],
        outlines: Mapping[str, list[Outline]],
        problems: list[BadFile],
        lists: list[Path],
        notes: list[str],
    ) -> None:
        super().__init__("ddti", root, items, problems, lists, notes)
        self.outlines = outlines

    def mask(self, item: Item, width: int, height: int) -> np.ndarray:
        mask = Image.new("L", (width, height))
        for outline in self.outlines[item.key]:
            ImageDraw.Draw(mask).polygon(outline, fill=255, outline=255)
        return np.asarray(mask)


@dataclass
class Mark:
    """The outlines of an image, or what is wrong with them; by default there are none, which is wrong."""

    outlines: list[Outline] = field(default_factory=list)
    trouble: str = "it has no outline of this image"


@dataclass
class Case:
    """What an XML file says: class and marks by image number, or what is wrong with it."""

    category: str = "unknown"
    marks: dict[str, Mark] = field(default_factory=dict)
    trouble: str = ""


def _case(path: Path) -> Case:
    try:
        root = markup.parse(path.read_bytes())
    except ValueError as error:
        return Case(trouble=str(error))
    tirads = root.findtext(".//tirads", "").strip().lower()
    if tirads and tirads not in TIRADS:
        return Case(trouble=f"its tirads is {tirads!r}, not {', '.join(TIRADS)} or empty")
    case = Case(f"tirads_{tirads}" if tirads else "unknown")
    for element in root.iter("mark"):
        number = image_name(element.findtext("image", "").strip())
        regions = element.findtext("svg", "").strip()
        if not regions:
            continue
        if not number:
            return Case(trouble="it has a mark that says no image")
        mark = case.marks.setdefault(number, Mark())
        try:
            mark.outlines += _outlines(regions)
            if mark.outlines and mark.trouble == Mark.trouble:
                mark.trouble = ""
        except ValueError as error:
            mark.trouble = str(error)
    return case


def _outlines(regions: str) -> list[Outline]:
    """The regions of a mark that enclose something.

    Raises:
        ValueError: not JSON (cut off, most often), or not the list of regions described above.
    """
    try:
        found = [
            [(float(point["x"]), float(point["y"])) for point in region["points"]] for region in json.loads(regions)
        ]
    except json.JSONDecodeError as error:
        raise ValueError(f"an outline is cut off or not JSON ({error})") from error
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"an outline is no list of points ({error!r})") from error
    if not all(-FARTHEST < place < FARTHEST for outline in found for point in outline for place in point):
        raise ValueError("an outline has a point far outside of any image")
    return [outline for outline in found if len(outline) >= 3]
