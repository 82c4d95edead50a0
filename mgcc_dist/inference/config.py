"""Options of `mgcc predict` and `mgcc export`."""

from dataclasses import dataclass
from typing import Literal

from mgcc_dist.common.options import argument, flag
from mgcc_dist.common.value_types import (
    FileOrFolder,
    FilePath,
    FolderPath,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitInterval,
)

MaskFormat = Literal["png", "nifti", "dicom-seg"]


@dataclass(frozen=True)
class PredictConfig:
    run: FolderPath
    """folder of a segmentation run"""
    images: tuple[FileOrFolder, ...] = argument(nargs="+")
    """images, DICOM files, or folders of them with any subfolders; - reads a list of paths from standard input"""
    out: FolderPath = argument()
    """output folder; new, or of the same prediction"""
    weights: Literal["best", "last"] = "best"
    """best: highest validation score; last: last step"""
    masks: tuple[MaskFormat, ...] = argument(("png",), nargs="+")
    """formats of the masks; dicom-seg only for DICOM"""
    contours: bool = flag()
    """also write contours, areas and diameters of each lesion as JSON"""
    probabilities: bool = flag()
    """also write probability maps, 16-bit PNG; 65535 is 1"""
    spacing: tuple[PositiveFloat, ...] = argument((), nargs="+")
    """mm per pixel of images that do not say it: one number, or one for x and one for y"""
    uncertainty: Literal["decoders", "tta", "ensemble"] | None = None
    """score each image by how well the predictions of the network's decoders, of mirrored images, or of several runs
    agree; decoders are in the run's checkpoint, so they need --weights last"""
    members: tuple[FolderPath, ...] = argument((), nargs="+")
    """further runs of --uncertainty ensemble; masks are those of --run"""
    reject_below: UnitInterval | None = None
    """score below which an image is marked for review by a person; see mgcc evaluate --uncertainty"""
    uncertainty_maps: bool = flag()
    """also write maps of the disagreement, 16-bit PNG; 65535 is 1 bit"""
    calibrated: bool = flag()
    """apply the temperature of mgcc evaluate --fit-temperature to probabilities; masks do not change"""
    keep_identifiers: bool = flag()
    """name outputs of DICOM files after their paths, and copy the patient into dicom-seg"""
    batch: PositiveInt = 8
    """images per forward pass, as memory allows"""
    workers: NonNegativeInt = 2
    """processes that read images; 0 for none"""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """implementations of the fused layers; see mgcc_dist.kernels.dispatcher"""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """auto: bf16 where supported; no: float32"""
    skip_bad: bool = flag()
    """list unreadable images in skipped.csv and continue"""
    overwrite: bool = flag()
    """predict all images again, also with other images or weights; refuses if files were changed by hand"""


@dataclass(frozen=True)
class ExportConfig:
    run: FolderPath
    """folder of a segmentation run"""
    out: FilePath = argument()
    """file to write: .onnx, .pt (torchscript) or .xml (openvino, with .bin next to it)"""
    to: Literal["onnx", "torchscript", "openvino"] = "onnx"
    """format"""
    weights: Literal["best", "last"] = "best"
    """best: highest validation score; last: last step"""
    overwrite: bool = flag()
    """replace a file that is something else"""
