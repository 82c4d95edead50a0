"""Options of `mgcc predict`, `mgcc export`, `mgcc push` and `mgcc pull`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mgcc_dist.common.options import argument, flag
from mgcc_dist.common.value_types import (
    FileOrFolder,
    FileOrName,
    FilePath,
    Folder,
    FolderPath,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RunOrModel,
    UnitInterval,
)

MaskFormat = Literal["png", "nifti", "dicom-seg"]


@dataclass(frozen=True)
class PredictConfig:
    images: tuple[FileOrFolder, ...] = argument(nargs="+", positional=True, named=True)
    """images, DICOM files, or folders of them with any subfolders; - reads a list of paths from standard input; may
    also be given by --images"""
    run: RunOrModel = argument(alias="model")
    """folder of a segmentation run or model, or a shipped model by name (mgcc list models); --model is the same"""
    out: FolderPath = Path("predictions")
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
    """mm per pixel of images whose file does not say it: one number, or one for x and one for y"""
    uncertainty: Literal["decoders", "tta", "ensemble"] | None = None
    """score each image by how well the predictions of the network's decoders, of mirrored images, or of several runs
    agree; decoders are in a run's checkpoint, so they need --weights last"""
    members: tuple[RunOrModel, ...] = argument((), nargs="+")
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
    backend: str = "torch"
    """torch, onnx, openvino, a file of mgcc export, or auto: the fastest, for 100 images or more"""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """implementation of up-convolutions, gates and ConvMixer layers, as in mgcc segment"""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """auto: bf16 where supported; no: float32"""
    skip_bad: bool = flag()
    """list unreadable images in skipped.csv and continue"""
    overwrite: bool = flag()
    """predict all images again, also with other images or weights; refuses if files were changed by hand"""


@dataclass(frozen=True)
class ExportConfig:
    run: RunOrModel = argument(alias="model")
    """folder of a segmentation run or model, or a shipped model by name (mgcc list models); --model is the same"""
    out: FilePath = argument()
    """file to write: .onnx, .pt (torchscript) or .xml (openvino, with .bin next to it); folder for safetensors and
    monai"""
    to: Literal["onnx", "torchscript", "openvino", "safetensors", "monai"] = "onnx"
    """format; safetensors: a model folder for --model and mgcc push, with 16-bit weights and a model card; monai: a
    MONAI bundle"""
    weights: Literal["best", "last"] = "best"
    """best: highest validation score; last: last step"""
    int8: Folder | None = None
    """onnx: 8-bit convolutions, calibrated with the validation images of this shard folder, on which the loss of IoU is
    measured"""
    split: FileOrName | None = None
    """split file or shipped split whose validation images --int8 takes; none: the split of the run"""
    max_iou_loss: NonNegativeFloat = 0.01
    """loss of IoU from which --int8 is refused"""
    decoders: bool = flag()
    """safetensors: also write the auxiliary decoders, for --uncertainty decoders; they are in the run's checkpoint, so
    this needs --weights last"""
    evaluations: tuple[FolderPath, ...] = argument((), nargs="+")
    """safetensors: output folders of mgcc evaluate on this model folder, whose scores the model card shows"""
    overwrite: bool = flag()
    """replace a file or model that is something else"""


@dataclass(frozen=True)
class PushConfig:
    repo: Name = argument(positional=True)
    """repository on the Hub, USER/NAME; it is created if it does not exist"""
    model: RunOrModel = argument()
    """model folder of mgcc export --to safetensors, or a shipped model by name (mgcc list models)"""
    revision: str | None = None
    """branch; none: main"""
    private: bool = flag()
    """create a private repository"""


@dataclass(frozen=True)
class PullConfig:
    repo: Name = argument(positional=True)
    """repository on the Hub, USER/NAME"""
    out: FolderPath | None = None
    """folder to write; none: NAME in the current folder"""
    revision: str | None = None
    """branch, tag or commit; none: main"""
    overwrite: bool = flag()
    """replace a model folder"""
