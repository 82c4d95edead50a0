"""Read DICOM images and cines, frame by frame, as 8-bit grey arrays. Needs pydicom (extra `clinic`).

MONOCHROME1 is inverted; RGB, YBR and palettes become luminance. Grey values of more than 8 bits are scaled by the
header's window, or without one by the bits stored. Of the Sequence of Ultrasound Regions the two-dimensional regions
are used, with their millimetres per pixel. Headers are untrusted: every damage becomes a `BadFile`, whose text never
quotes the header, which may hold a patient's name.
"""

import logging
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mgcc_dist.common.errors import reason_of
from mgcc_dist.data.dicom_regions import Region, find_regions, value_of
from mgcc_dist.data.images import BadFile, find_unreadable

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
MAX_PIXELS = 2**27  # of a frame
MAX_FRAMES = 2**17  # an hour at 36 frames per second
FRAGMENT_BYTES = 8  # a compressed frame has at least one fragment, which begins with a tag and a length
MAX_INFLATED = 2**30  # bytes of a deflated file
DEEP_JPEG = "1.2.840.10008.1.2.4.51"  # JPEG of 12 bits, which Pillow only reads up to 8 bits
DEFLATED = "1.2.840.10008.1.2.1.99"
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
REFERENCED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
HEADER_TAGS = (
    *REFERENCED,
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel"),
    *("PhotometricInterpretation", "BitsAllocated", "BitsStored", "PixelRepresentation", "PixelSpacing"),
    *("SequenceOfUltrasoundRegions", "WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"),
)
PLUGINS = {  # the package that decodes a syntax, where pydicom with Pillow and pyjpegls does not
    DEEP_JPEG: "pylibjpeg[libjpeg]",
    "1.2.840.10008.1.2.4.57": "pylibjpeg[libjpeg]",
    "1.2.840.10008.1.2.4.70": "pylibjpeg[libjpeg]",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg[openjpeg]",
    "1.2.840.10008.1.2.4.91": "pylibjpeg[openjpeg]",
    "1.2.840.10008.1.2.4.201": "pylibjpeg[openjpeg]",
    "1.2.840.10008.1.2.4.202": "pylibjpeg[openjpeg]",
    "1.2.840.10008.1.2.4.203": "pylibjpeg[openjpeg]",
}

Offsets = tuple[list[int], list[int]]
"""of the compressed frames in the pixel data, and their lengths"""


class NoImage(BadFile):
    """A DICOM file that holds something other than an image, such as a report or a directory."""


@dataclass(frozen=True)
class DicomHeader:
    """What reading the frames of a file needs."""

    path: Path
    uid: str
    """SOP Instance UID; "" if it has no valid one"""
    syntax: str
    """UID of the transfer syntax"""
    frames: int
    shape: tuple[int, int]
    """height, width"""
    photometric: str
    bits: int
    """bits stored per value"""
    signed: bool
    window: tuple[float, float] | None
    """center and width, of values of more than 8 bits"""
    rescale: tuple[float, float]
    """slope and intercept"""
    regions: tuple[Region, ...]
    """the two-dimensional regions; the complete image if the header has none"""
    missing_uid: str
    """name of the first UID that an object which refers to the image needs, and that it lacks; \"\" if it has all"""


def is_dicom(path: Path) -> bool:
    """Return whether a file is named as DICOM or has DICOM's preamble. False if it can't be opened."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_header(path: Path) -> DicomHeader:
    """Read the header of a DICOM image and check that its frames can be decoded.

    Raises:
        NoImage: the file is DICOM but not an image.
        BadFile: the file is damaged, or of a kind that can't be read; the message says which.
    """
    try:
        with _quiet():
            dataset = _read_dataset(path, HEADER_TAGS)
            if str(dataset.get("SOPClassUID", "")) in SEGMENTATIONS:
                raise NoImage(path, "is a DICOM segmentation, not an image")
            if "Rows" not in dataset or "Columns" not in dataset:
                raise NoImage(path, "is DICOM but not an image (no Rows and Columns)")
            syntax = _transfer_syntax(dataset)
            if problem := _unsupported_syntax(syntax):
                raise BadFile(path, problem)
            return _header(path, dataset, syntax)
    except (BadFile, ModuleNotFoundError):
        raise
    except Exception as error:  # values of any type and length
        raise BadFile(path, "not a readable DICOM image (its header is damaged)") from error


def read_frames(header: DicomHeader, indices: Sequence[int]) -> Iterator[np.ndarray | BadFile]:
    """Yield frames as uint8 [H,W], or why one can't be read. Holds one decoded frame in memory.

    After a frame that can't be read, the next one is tried.
    """
    offsets = _frame_offsets(header) if header.frames > 1 else None
    for index in indices:
        try:
            with _quiet():
                frame = _read_frame(header, index, offsets)
        except BadFile as bad:
            yield bad
        except OSError as error:  # its text quotes the path
            yield find_unreadable(header.path) or BadFile(header.path, f"can't be read ({error.strerror})")
        except Exception as error:  # decoders raise many types for damaged files
            which = f" of frame {index + 1}" if header.frames > 1 else ""
            more = f". `pip install '{PLUGINS[DEEP_JPEG]}'` adds a decoder" if header.syntax == DEEP_JPEG else ""
            yield BadFile(header.path, f"the pixels{which} can't be decoded ({reason_of(error)}){more}")
        else:
            yield frame


def read_single_frame(path: Path) -> tuple[np.ndarray, tuple[Region, ...]]:
    """Read an image uint8 [H,W] and its regions.

    Raises:
        BadFile: it can't be read, or is a cine.
    """
    header = read_header(path)
    if header.frames > 1:
        raise BadFile(path, f"is a cine of {header.frames} frames. Segment it with `mgcc predict`.")
    (image,) = read_frames(header, [0])
    if isinstance(image, BadFile):
        raise image
    return image, header.regions


def read_references(path: Path) -> Any:
    """Read the header, without pixels, for objects that refer to the image.

    Raises:
        BadFile: the file is damaged.
    """
    return _read_dataset(path)


def _read_frame(header: DicomHeader, index: int, offsets: Offsets | None) -> np.ndarray:
    from pydicom import Dataset
    from pydicom.pixels import iter_pixels

    if header.syntax == DEFLATED:
        dataset = _read_dataset(header.path)
        (pixels,) = iter_pixels(dataset, indices=[index])
    else:
        dataset = Dataset()  # gets the palette
        options: dict[str, Any] = {"extended_offsets": offsets} if offsets else {}
        (pixels,) = iter_pixels(
            header.path, ds_out=dataset, indices=[index], transfer_syntax_uid=header.syntax, **options
        )
    return _to_grey(pixels, header, dataset)


def _frame_offsets(header: DicomHeader) -> Offsets | None:
    """Find each frame of compressed pixels, if each is one fragment. Otherwise pydicom reads all frames before it."""
    from pydicom import dcmread
    from pydicom.encaps import parse_basic_offsets, parse_fragments
    from pydicom.uid import UID

    try:
        with _quiet(), header.path.open("rb") as file:
            if not UID(header.syntax).is_encapsulated:
                return None
            dcmread(file, stop_before_pixels=True, specific_tags=["Rows"], force=True)
            file.seek(12, 1)  # tag, VR and length of Pixel Data
            parse_basic_offsets(file)
            count, starts = parse_fragments(file)
            if count != header.frames:
                return None
            file.seek(starts[-1] + 4)
            last = starts[-1] + 8 + int.from_bytes(file.read(4), "little")
            ends = [*starts[1:], last]
            return [start - starts[0] for start in starts], [e - s - 8 for s, e in zip(starts, ends, strict=True)]
    except Exception:  # damaged: reading the frames says how
        return None


def _read_dataset(path: Path, tags: tuple[str, ...] = ()) -> Any:
    """Read a pydicom Dataset without pixels, or of a deflated file with them; only some tags if `tags` names any."""
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info

    if bad := find_unreadable(path):
        raise bad
    forced = path.suffix.lower() in DICOM_SUFFIXES  # also without preamble and file meta information
    try:
        with _quiet():
            with path.open("rb") as file:
                has_preamble = file.read(132)[128:] == b"DICM"
            deflated = has_preamble and read_file_meta_info(path).get("TransferSyntaxUID") == DEFLATED
            if deflated and _inflates_beyond(path, MAX_INFLATED):
                raise BadFile(path, "is deflated to more than 1 GB. Store it without deflation.")
            stop = bool(tags) or not deflated
            dataset = dcmread(path, force=forced, stop_before_pixels=stop, specific_tags=list(tags) or None)
            if not has_preamble and not any(tag in dataset for tag in ("SOPClassUID", "Rows")):
                raise BadFile(path, "not a readable DICOM file")
            return dataset
    except BadFile:
        raise
    except Exception as error:  # pydicom raises many types for damaged files
        raise BadFile(path, "not a readable DICOM file") from error


def _header(path: Path, dataset: Any, syntax: str) -> DicomHeader:
    height, width = int(dataset.Rows), int(dataset.Columns)
    frames = int(dataset.get("NumberOfFrames") or 1)
    samples = int(value_of(dataset, "SamplesPerPixel", 1))
    photometric = str(value_of(dataset, "PhotometricInterpretation", ""))
    bits, allocated = (int(value_of(dataset, name, 8)) for name in ("BitsStored", "BitsAllocated"))
    if height < 1 or width < 1 or frames < 1:
        raise BadFile(path, f"has no pixels ({width}x{height}, {frames} frames)")
    if height * width > MAX_PIXELS:
        raise BadFile(path, f"is too large ({width}x{height}, more than {MAX_PIXELS} pixels)")
    if frames > MAX_FRAMES or (syntax != DEFLATED and frames * FRAGMENT_BYTES > path.stat().st_size):
        raise BadFile(path, f"says that it has {frames} frames, which is too many for its size or for this program")
    expected = 3 if photometric in COLOUR else 1
    if photometric not in (*GREY, *COLOUR, "PALETTE COLOR") or samples != expected:
        known = re.fullmatch(r"[A-Z0-9_ ]{1,16}", photometric)
        raise BadFile(
            path,
            f"has the photometric interpretation {photometric if known else '(invalid)'} with {samples} samples per "
            "pixel, which is not supported. Convert it to MONOCHROME2 or RGB.",
        )
    if allocated not in (8, 16) or not 1 <= bits <= allocated:
        raise BadFile(path, f"has {bits} of {allocated} bits per value. Save it with 8 or 16 bits.")
    uid = str(dataset.get("SOPInstanceUID", ""))
    return DicomHeader(
        path=path,
        uid=uid if re.fullmatch(r"[0-9]+(\.[0-9]+)+", uid) and len(uid) <= 64 else "",
        syntax=syntax,
        frames=frames,
        shape=(height, width),
        photometric=photometric,
        bits=bits,
        signed=bool(int(value_of(dataset, "PixelRepresentation", 0))),
        window=_window(dataset) if bits > 8 else None,
        rescale=(float(value_of(dataset, "RescaleSlope", 1)), float(value_of(dataset, "RescaleIntercept", 0))),
        regions=find_regions(dataset, height, width),
        missing_uid=next((name for name in REFERENCED if not dataset.get(name)), ""),
    )


def _window(dataset: Any) -> tuple[float, float] | None:
    center, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if center is None or width is None:
        return None
    first = [float(np.atleast_1d(value)[0]) for value in (center, width)]
    return (first[0], first[1]) if first[1] > 1 else None


def _transfer_syntax(dataset: Any) -> str:
    syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if syntax:
        return str(syntax)
    implicit, little = dataset.original_encoding
    return "1.2.840.10008.1.2" if implicit else f"1.2.840.10008.1.2.{1 if little else 2}"


def _unsupported_syntax(syntax: str) -> str:
    """Return why frames of a transfer syntax can't be decoded here, and what to do; "" if they can."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    uid = UID(syntax)
    shown = syntax if re.fullmatch(r"[0-9.]{1,64}", syntax) else "(invalid)"
    name = uid.name if uid.name != syntax else f"the private or unknown transfer syntax {shown}"
    if re.search("MPEG|HEVC|SMPTE", name):
        return f"is video ({name}). Export it as single frames, or as an uncompressed cine."
    try:
        decoder = get_decoder(uid)
    except NotImplementedError:
        return f"is stored as {name}, which pydicom can't decode. Convert it, for example with gdcmconv --raw."
    if decoder.is_available:
        return ""
    plugin = PLUGINS.get(syntax, "pylibjpeg[all]")
    return f"is compressed as {name}, which needs a plugin. Run `pip install '{plugin}'`."


def _inflates_beyond(path: Path, limit: int) -> bool:
    """Return whether a deflated file is larger than `limit` bytes, without holding it in memory."""
    from pydicom.filereader import _read_file_meta_info as skip_meta
    from pydicom.filereader import read_preamble

    with path.open("rb") as file:
        read_preamble(file, force=False)
        skip_meta(file)
        inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while total <= limit and not inflater.eof and (chunk := inflater.unconsumed_tail or file.read(1 << 16)):
            total += len(inflater.decompress(chunk, 1 << 22))
    return total > limit


def _to_grey(pixels: np.ndarray, header: DicomHeader, dataset: Any) -> np.ndarray:
    """Convert a decoded frame to uint8 [H,W]."""
    from pydicom.pixels import apply_color_lut

    bits = header.bits
    if header.photometric == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)[:, :, :3]
        bits = pixels.dtype.itemsize * 8
    if pixels.shape[:2] != header.shape:
        raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]}, not {header.shape[1]}x{header.shape[0]} as the header")
    if pixels.ndim == 3:
        colour = (pixels >> (bits - 8) if bits > 8 else pixels).astype(np.uint8)
        return np.asarray(Image.fromarray(colour).convert("L"))
    grey = _window_to_8_bits(pixels, header) if header.window else _stored_to_8_bits(pixels, header)
    return 255 - grey if header.photometric == "MONOCHROME1" else grey


def _stored_to_8_bits(pixels: np.ndarray, header: DicomHeader) -> np.ndarray:
    if header.bits == 8 and not header.signed:
        return pixels.astype(np.uint8)
    values = pixels.astype(np.int32) + (1 << (header.bits - 1) if header.signed else 0)
    scaled = values >> (header.bits - 8) if header.bits >= 8 else values << (8 - header.bits)
    return scaled.clip(0, 255).astype(np.uint8)


def _window_to_8_bits(pixels: np.ndarray, header: DicomHeader) -> np.ndarray:
    """Apply the linear window (DICOM PS3.3 C.11.2.1.2)."""
    center, width = header.window or (0.0, 2.0)
    slope, intercept = header.rescale
    values = (pixels.astype(np.float32) * slope + intercept - (center - 0.5)) / (width - 1) + 0.5
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence pydicom's warnings and logs, which quote values of the header, such as names."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
