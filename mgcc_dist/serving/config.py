"""Options of `mgcc serve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mgcc_dist.common.options import argument, flag
from mgcc_dist.common.value_types import (
    FileOrFolder,
    FolderPath,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RunOrModel,
)


@dataclass(frozen=True)
class ServeConfig:
    run: RunOrModel = argument(alias="model")
    """folder of a segmentation run or model, or a shipped model by name (mgcc list models); --model is the same"""
    out: FolderPath = Path("corrections")
    """folder of the corrections: a new one, or that of an earlier start, which is continued"""
    images: tuple[FileOrFolder, ...] = argument((), nargs="+")
    """images, DICOM files, or folders of them with any subfolders, to correct one after the other"""
    order: Literal["name", "uncertainty"] = "name"
    """order of --images; uncertainty: the lowest score first"""
    uncertainty: Literal["decoders", "tta", "ensemble"] | None = "tta"
    """where the map and the score come from, as in mgcc predict; none is faster"""
    members: tuple[RunOrModel, ...] = argument((), nargs="+")
    """further runs of --uncertainty ensemble; masks are those of --run"""
    weights: Literal["best", "last"] = "best"
    """best: highest validation score; last: last step"""
    spacing: tuple[PositiveFloat, ...] = argument((), nargs="+")
    """mm per pixel of images whose file does not say it: one number, or one for x and one for y"""
    port: NonNegativeInt = 0
    """port on this machine; 0: any free one"""
    max_upload_mb: PositiveInt = 256
    """largest file that the page accepts"""
    no_browser: bool = flag()
    """only print the page's address"""
