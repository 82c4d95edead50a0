"""Write masks as NIfTI (.nii.gz), frame by frame. Needs nibabel (extra `clinic`)."""

import gzip
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.dicom_regions import Spacing

MAX_SIDE = 2**15 - 1


class NiftiWriter:
    """Writes uint8 voxels [W,H,frames] of 0 and 1, one frame [H,W] at a time.

    Columns run to the left and rows to the back of NIfTI's axes, as ITK and 3D Slicer read a plain image. Frames are
    1 mm apart. Without a spacing a pixel counts as 1 mm, and the header gives no unit.

    Raises:
        UserError: a side is longer than the format allows.
    """

    def __init__(self, path: Path, shape: tuple[int, int], frames: int, spacing: Spacing | None) -> None:
        from nibabel.nifti1 import Nifti1Header

        if max(*shape, frames) > MAX_SIDE:
            raise UserError(f"--masks nifti: holds at most {MAX_SIDE} pixels per side and frames. Choose --masks png.")
        header = Nifti1Header()
        header.set_data_shape((shape[1], shape[0], frames))
        header.set_data_dtype(np.uint8)
        x, y = spacing or (1.0, 1.0)
        affine = np.diag([-x, -y, 1.0, 1.0])
        header.set_sform(affine, "scanner")
        header.set_qform(affine, "scanner")
        header.set_xyzt_units("mm" if spacing else "unknown")
        header["magic"] = b"n+1"
        header["vox_offset"] = 352
        self._file = gzip.GzipFile(path, "wb", compresslevel=5, mtime=0)
        self._file.write(header.binaryblock + bytes(4))  # no extensions

    def write(self, mask: np.ndarray) -> None:
        """Append a frame [H,W] that is 0 outside."""
        self._file.write((mask > 0).astype(np.uint8).tobytes())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
