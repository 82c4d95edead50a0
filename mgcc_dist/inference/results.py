"""Write what `mgcc predict` found: masks, overlays, probability maps and contours of a frame, and rows of the table."""

import csv
import io
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from torch import Tensor

from mgcc_dist.data.dicom_regions import Region
from mgcc_dist.data.geometry import Fit, restore_strips
from mgcc_dist.data.images import resize_image
from mgcc_dist.evaluation.temperature import calibrate
from mgcc_dist.inference.config import MaskFormat
from mgcc_dist.inference.dicom_seg import write_segmentation
from mgcc_dist.inference.lesions import Lesion, describe, find_lesions
from mgcc_dist.inference.nifti import NiftiWriter
from mgcc_dist.inference.output_folder import CONTOURS, MASKS, OVERLAYS, PROBABILITIES, UNCERTAINTY, OutputFolder
from mgcc_dist.inference.overlay import overlay
from mgcc_dist.inference.predictor import THRESHOLD
from mgcc_dist.inference.reading import Frame
from mgcc_dist.inference.sources import Source
from mgcc_dist.inference.uncertainty import agreement, disagreement

CODEC = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names need not be UTF-8


@dataclass(frozen=True)
class OutputOptions:
    """What is written for each image."""

    masks: tuple[MaskFormat, ...] = ("png",)
    contours: bool = False
    probabilities: bool = False
    keep_identifiers: bool = False
    uncertainty_maps: bool = False
    reject_below: float | None = None
    temperature: float = 1.0
    """of confidence and probability maps"""

    def names(self, source: Source) -> list[str]:
        """The files of a source."""
        per_frame = [(OVERLAYS, ".png")]
        per_frame += [(MASKS, ".png")] * ("png" in self.formats(source))
        per_frame += [(PROBABILITIES, ".png")] * self.probabilities + [(CONTOURS, ".json")] * self.contours
        per_frame += [(UNCERTAINTY, ".png")] * self.uncertainty_maps
        frames = [source.name(index) for index in range(source.frames)]
        names = [f"{folder}/{name}{suffix}" for folder, suffix in per_frame for name in frames]
        return names + [mask_name(source, 0, kind) for kind in self.formats(source) if kind != "png"]

    def formats(self, source: Source) -> list[MaskFormat]:
        """The formats of a source's masks: dicom-seg refers to a DICOM file."""
        kinds = dict.fromkeys(self.masks)
        formats: list[MaskFormat] = [kind for kind in kinds if kind != "dicom-seg" or source.dicom]
        return formats or ["png"]


def mask_name(source: Source, frame: int, kind: MaskFormat) -> str:
    """The mask's file: PNG is one file per frame, the others are one per image or cine."""
    suffix = {"nifti": ".nii.gz", "dicom-seg": ".dcm"}.get(kind)
    return f"{MASKS}/{source.stem}{suffix}" if suffix else f"{MASKS}/{source.name(frame)}.png"


@dataclass
class RegionResult:
    """The part of a mask in one region."""

    area: int
    """pixels"""
    confidence: float
    lesions: list[Lesion]
    score: float | None = None
    """agreement of the members, with --uncertainty"""


class SourceWriter:
    """Writes the files of one image or cine, frame by frame, in order."""

    def __init__(
        self, out: OutputFolder, source: Source, number: int, frame: Frame, options: OutputOptions, weights: str
    ) -> None:
        self.out, self.source, self.options = out, source, options
        self.formats = options.formats(source)
        self._number, self._weights = number, weights
        self._shape = frame.shape
        spacings = {region.spacing for region in frame.regions}
        self._spacing = spacings.pop() if len(spacings) == 1 else None
        self._files = ExitStack()
        self._written = 0
        self._nifti: NiftiWriter | None = None
        self._volume: np.memmap | None = None
        self._segmentation: Path | None = None

    def __enter__(self) -> Self:
        with self._files:  # which closes them if one can't be opened
            self._open()
            self._files = self._files.pop_all()
        return self

    def _open(self) -> None:
        if "nifti" in self.formats:
            scratch = self._files.enter_context(self.out.writing(mask_name(self.source, 0, "nifti")))
            self._nifti = self._files.enter_context(
                NiftiWriter(scratch, self._shape, self.source.frames, self._spacing)
            )
        if "dicom-seg" in self.formats:
            self._segmentation = self._files.enter_context(self.out.writing(mask_name(self.source, 0, "dicom-seg")))
            # On disk, so that a long cine needs no memory.
            volume = self._segmentation.with_name(f".volume{self._segmentation.name}")
            self._files.callback(volume.unlink, missing_ok=True)
            with volume.open("wb") as file:  # all of it, because writing to a map on a full disk kills the process
                os.posix_fallocate(file.fileno(), 0, self.source.frames * self._shape[0] * self._shape[1])
            self._volume = np.memmap(volume, np.uint8, "r+", shape=(self.source.frames, *self._shape))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            self._files.__exit__(kind, error, trace)  # removes the incomplete files
            return
        with self._files:
            self._skip_to(self.source.frames)
            if self._segmentation and self.source.dicom and self._volume is not None:
                write_segmentation(
                    *(self._segmentation, self._volume, self.source.dicom, self._spacing, self._weights),
                    number=self._number,
                    keep_identifiers=self.options.keep_identifiers,
                )

    def write(
        self, frame: Frame, squares: Sequence[Tensor], fit: Fit, members: Sequence[Tensor] = ()
    ) -> list[dict[str, Any]]:
        """Write the files of one frame; returns its rows of predictions.csv, one per region.

        Args:
            squares: the probability [S,S] of each region.
            members: with --uncertainty, the members' probabilities [M,S,S] of each region.
        """
        self._skip_to(frame.index)
        name = self.source.name(frame.index)
        mask = np.zeros(frame.shape, np.uint8)
        probability = np.zeros(frame.shape, np.uint16) if self.options.probabilities else None
        results = []
        for square, region in zip(squares, frame.regions, strict=True):
            view = mask[region.rows, region.columns]
            part = np.zeros_like(view) if len(squares) > 1 else view  # regions may overlap
            seen = None if probability is None else probability[region.rows, region.columns]
            values = None if seen is None else np.zeros_like(seen)
            results.append(self._restore(square, region, part, values, fit))
            np.maximum(view, part, out=view)
            if seen is not None and values is not None:
                np.maximum(seen, values, out=seen)
        if "png" in self.formats:
            self.out.write(mask_name(self.source, frame.index, "png"), png(mask))
        small = resize_image(mask, frame.picture.shape[1], frame.picture.shape[0])
        self.out.write(f"{OVERLAYS}/{name}.png", png(overlay(frame.picture, small > 127)))
        if probability is not None:
            self.out.write(f"{PROBABILITIES}/{name}.png", png(probability))
        for result, region_members in zip(results, members, strict=False):
            result.score = agreement(region_members)
        if self.options.uncertainty_maps:
            self.out.write(f"{UNCERTAINTY}/{name}.png", png(disagreement_map(frame, members, fit)))
        if self.options.contours:
            self.out.write(f"{CONTOURS}/{name}.json", self._contours(frame, results))
        if self._nifti:
            self._nifti.write(mask)
        if self._volume is not None:
            self._volume[frame.index] = mask > 0
        self._written = frame.index + 1
        return [self._row(frame, number, result) for number, result in enumerate(results)]

    def _restore(
        self, square: Tensor, region: Region, mask: np.ndarray, probability: np.ndarray | None, fit: Fit
    ) -> RegionResult:
        return restore_region(square, region, mask, probability, fit, self.options.contours, self.options.temperature)

    def _skip_to(self, index: int) -> None:
        """Leave frames that could not be read empty."""
        while self._written < index:
            if self._nifti:
                self._nifti.write(np.zeros(self._shape, np.uint8))
            self._written += 1

    def _row(self, frame: Frame, number: int, result: RegionResult) -> dict[str, Any]:
        region = frame.regions[number]
        rows, columns, spacing = region
        size = (rows.stop - rows.start) * (columns.stop - columns.start)
        first = result.lesions[0] if result.lesions else None
        longest, across = (f"{first.longest:.3f}", f"{first.perpendicular:.3f}") if first else ("0", "0")
        return {
            "file": self.source.file,
            "mask": mask_name(self.source, frame.index, self.formats[0]),
            "width": frame.shape[1],
            "height": frame.shape[0],
            "area_pixels": result.area,
            "area_fraction": f"{result.area / size:.6f}",
            "confidence": f"{result.confidence:.4f}",
            "lesion": "yes" if result.area else "no",
            "frame": frame.index + 1,
            "region": number + 1,
            "spacing_x_mm": f"{spacing[0]:g}" if spacing else "",
            "spacing_y_mm": f"{spacing[1]:g}" if spacing else "",
            "area_mm2": f"{result.area * spacing[0] * spacing[1]:.3f}" if spacing else "",
            "longest_diameter_mm": longest if spacing else "",
            "perpendicular_diameter_mm": across if spacing else "",
            "longest_diameter_pixels": "" if spacing else longest,
            "perpendicular_diameter_pixels": "" if spacing else across,
            **self._review(result),
        }

    def _review(self, result: RegionResult) -> dict[str, str]:
        """The columns of --uncertainty."""
        if result.score is None:
            return {}
        limit = self.options.reject_below
        return {
            "score": f"{result.score:.4f}",
            "review": "" if limit is None else "yes" if result.score < limit else "no",
        }

    def _contours(self, frame: Frame, results: Sequence[RegionResult]) -> bytes:
        regions = [
            {
                "region": number,
                "box": [region.columns.start, region.rows.start, region.columns.stop, region.rows.stop],
                "spacing_mm": list(region.spacing) if region.spacing else None,
                "lesions": [describe(lesion, region.spacing) for lesion in result.lesions],
            }
            for number, (region, result) in enumerate(zip(frame.regions, results, strict=True), start=1)
        ]
        content = {
            "file": self.source.file,
            "frame": frame.index + 1,
            "width": frame.shape[1],
            "height": frame.shape[0],
            "regions": regions,
        }
        return (json.dumps(content) + "\n").encode()


def restore_region(
    square: Tensor,
    region: Region,
    mask: np.ndarray,
    probability: np.ndarray | None,
    fit: Fit,
    measure_all: bool = True,
    temperature: float = 1.0,
) -> RegionResult:
    """Set `mask` uint8 [H,W] of a region to 255 on the lesion, and fill `probability` uint16 [H,W], if it is given.

    Works in strips, so that the probability of a large image is never in memory as float. Without `measure_all` only
    the largest one is measured. The mask does not depend on `temperature`.
    """
    inside, highest = 0.0, 0.0
    for box, strip in restore_strips(square.cpu(), (mask.shape[0], mask.shape[1]), fit):
        values = strip.numpy()
        lesion = values > THRESHOLD
        mask[box][lesion] = 255
        values = calibrate(values, temperature)
        inside += float(values[lesion].sum(dtype=np.float64))
        highest = max(highest, float(values.max()))
        if probability is not None:
            probability[box] = np.rint(values * np.float32(65535)).astype(np.uint16)
    area = int(np.count_nonzero(mask))
    corner = (region.columns.start, region.rows.start)
    lesions = find_lesions(mask, region.spacing, corner, None if measure_all else 1) if area else []
    return RegionResult(area, inside / area if area else 1 - highest, lesions)


def disagreement_map(frame: Frame, members: Sequence[Tensor], fit: Fit) -> np.ndarray:
    """Return the `disagreement` of the members at the frame's size, uint16 [H,W], 65535 for 1 bit; 0 outside regions.

    Where regions overlap, it is the largest.
    """
    pixels = np.zeros(frame.shape, np.uint16)
    for region_members, region in zip(members, frame.regions, strict=True):
        view = pixels[region.rows, region.columns]
        for box, strip in restore_strips(disagreement(region_members), (view.shape[0], view.shape[1]), fit):
            values = np.rint(strip.numpy().clip(0, 1) * np.float32(65535)).astype(np.uint16)
            np.maximum(view[box], values, out=view[box])
    return pixels


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def table(rows: Sequence[dict[str, Any]]) -> bytes:
    """CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(**CODEC)


def files_of(content: bytes) -> set[str]:
    """The column `file` of a table."""
    return {row.get("file", "") for row in csv.DictReader(io.StringIO(content.decode(**CODEC)))}
