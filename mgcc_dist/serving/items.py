"""What the page shows one at a time: an image, a frame of a cine, or one of several regions of either."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mgcc_dist.data.dicom import is_dicom, read_frames, read_header
from mgcc_dist.data.dicom_regions import Region, Spacing
from mgcc_dist.data.images import FORMATS, SUFFIXES, BadFile, find_unreadable, read_grey
from mgcc_dist.inference.sources import VIDEO, VIDEO_SUFFIXES, Source

MAX_PIXELS = 2**25
"""of an image on the page; browsers hold several copies of it"""
MAX_SIDE = 2**14
"""longest side that browsers draw"""
MAX_NAME = 80
"""characters of an uploaded file's name that are kept"""
ADVICE = "Reduce it, or use `mgcc predict`."


@dataclass(frozen=True)
class Item:
    """One image to correct."""

    source: Source
    frame: int
    """index, from 0"""
    region: int
    """index, from 0"""

    @property
    def regions(self) -> int:
        return len(self.source.dicom.regions) if self.source.dicom else 1

    @property
    def name(self) -> str:
        """What its correction is called, without suffix: the folder reader takes subfolders for classes."""
        frame = f"-{self.frame + 1:04d}" if self.source.frames > 1 else ""
        region = f"-region{self.region + 1}" if self.regions > 1 else ""
        return f"{self.source.stem}{frame}{region}"


def items_of(source: Source) -> list[Item]:
    """All frames and regions of a source, in order."""
    regions = range(len(source.dicom.regions) if source.dicom else 1)
    return [Item(source, frame, region) for frame in range(source.frames) for region in regions]


def read_item(item: Item, bits: int | None, spacing: Spacing | None) -> tuple[np.ndarray, Spacing | None]:
    """Read the image uint8 [H,W] of an item, and its mm per pixel.

    Args:
        bits: that 16-bit pixels use (see `bits_used`).
        spacing: of images that have none.

    Raises:
        BadFile: it can't be read, or is too large for the page.
    """
    source = item.source
    if source.problem:
        raise BadFile(source.path, source.problem)
    if not source.dicom:
        check_size(source.path)
        return read_grey(source.path, bits), spacing
    region: Region = source.dicom.regions[item.region]
    _check_sides(source.path, *source.dicom.shape)
    (frame,) = read_frames(source.dicom, [item.frame])
    if isinstance(frame, BadFile):
        raise frame
    return np.ascontiguousarray(frame[region.rows, region.columns]), region.spacing or spacing


def check_size(path: Path) -> None:
    """Check the size of an image that is not DICOM by its header, before pixels are decoded.

    Raises:
        BadFile: it is too large, or not an image.
    """
    if bad := find_unreadable(path):
        raise bad
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise BadFile(path, f"is too large. {ADVICE}") from error
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise BadFile(path, f"is neither an image ({', '.join(SUFFIXES[:6])}, ...) nor DICOM") from error
    _check_sides(path, height, width)


def open_upload(path: Path, name: str, digest: str) -> Source:
    """Describe an uploaded file, after checks that need no pixels.

    Args:
        name: that the browser says it has; only what is harmless in it is used.
        digest: its sha256.

    Raises:
        BadFile: it is a video, not an image, or too large.
    """
    suffix = Path(name).suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        raise BadFile(path, VIDEO)
    if not is_dicom(path):
        check_size(path)
        stem = f"{safe_name(name)}-{digest[:8]}"
        return Source(path, stem, stem)
    header = read_header(path)
    _check_sides(path, *header.shape)
    key = header.uid or f"sha256-{digest}"
    return Source(path, key, key, header, private=True)


def safe_name(name: str) -> str:
    """Return the part of a file name that can be used as one, without folders and suffix: "image" if nothing is left.

    Letters of any language are kept.
    """
    last = re.split(r"[/\\]", name)[-1]
    stem = last.rpartition(".")[0] or last
    return re.sub(r"[^\w ()+-]+", "_", stem).strip("_ ")[:MAX_NAME] or "image"


def _check_sides(path: Path, height: int, width: int) -> None:
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        most = f"{MAX_PIXELS // 10**6} million pixels, or {MAX_SIDE} on a side"
        raise BadFile(path, f"is too large ({width}x{height}, more than {most}). {ADVICE}")
