"""What worker processes do for `mgcc predict`: decode frames and prepare them for the network.

Only squares, sizes and a reduced picture leave a worker, never a large image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.dicom import read_frames
from mgcc_dist.data.dicom_regions import Region, Spacing
from mgcc_dist.data.geometry import Fit, fit_image
from mgcc_dist.data.images import BadFile, read_grey, resize_image
from mgcc_dist.inference.sources import Source

MAX_OVERLAY = 4096
"""longest side of an overlay"""


@dataclass(frozen=True)
class Frame:
    """One image, or one frame of a cine, as the network and the outputs need it."""

    source: int
    """index into the list of sources"""
    index: int
    """of the frame, from 0"""
    shape: tuple[int, int]
    """height, width"""
    regions: tuple[Region, ...]
    """the parts that are segmented, each by itself"""
    squares: tuple[np.ndarray, ...]
    """of each region, as the network sees it, uint8 [S,S]"""
    picture: np.ndarray
    """uint8 [h,w], at most MAX_OVERLAY on a side"""


@dataclass(frozen=True)
class BadFrame:
    """An image or frame that can't be read."""

    source: int
    index: int
    problem: str


@dataclass(frozen=True)
class FrameReader:
    """Reads chunks of frames; callable in a worker process."""

    sources: Sequence[Source]
    chunks: Sequence[Sequence[tuple[int, int]]]
    """(index of the source, index of the frame) of the frames of each chunk"""
    size: int
    fit: Fit
    bits: int | None
    spacing: Spacing | None
    """of images that have none"""
    skip_bad: bool

    def __call__(self, chunk: int) -> list[Frame | BadFrame]:
        """Read one chunk.

        Raises:
            UserError: a frame can't be read, unless `skip_bad`.
        """
        read: list[Frame | BadFrame] = []
        for source, pairs in groupby(self.chunks[chunk], key=lambda pair: pair[0]):
            indices = [index for _, index in pairs]
            for index, image in zip(indices, self._images(self.sources[source], indices), strict=True):
                if isinstance(image, np.ndarray):
                    read.append(self._frame(source, index, image))
                elif self.skip_bad:
                    read.append(BadFrame(source, index, image.reason))
                else:
                    raise UserError(f"{str(image).rstrip('.')}. Fix it or pass --skip-bad.") from image
        return read

    def _images(self, source: Source, indices: list[int]) -> Iterator[np.ndarray | BadFile]:
        if source.problem:
            yield from (BadFile(source.path, source.problem) for _ in indices)
        elif source.dicom:
            yield from read_frames(source.dicom, indices)
        else:
            try:
                yield read_grey(source.path, self.bits)
            except BadFile as bad:
                yield bad

    def _frame(self, source: int, index: int, image: np.ndarray) -> Frame:
        shape = (image.shape[0], image.shape[1])
        dicom = self.sources[source].dicom
        regions = dicom.regions if dicom else (Region(slice(0, shape[0]), slice(0, shape[1]), None),)
        regions = tuple(Region(each.rows, each.columns, each.spacing or self.spacing) for each in regions)
        squares = tuple(fit_image(image[each.rows, each.columns], self.size, self.fit) for each in regions)
        return Frame(source, index, shape, regions, squares, reduced(image))


def reduced(image: np.ndarray) -> np.ndarray:
    """Resize uint8 [H,W] if a side is longer than MAX_OVERLAY."""
    scale = MAX_OVERLAY / max(image.shape)
    if scale >= 1:
        return image
    return resize_image(image, max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
