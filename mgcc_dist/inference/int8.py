"""INT8 for `mgcc export --int8`: ONNX Runtime's static quantization, and what it costs on validation images.

Convolutions compute in 8 bits: weights have a scale per output channel, activations one per tensor, from their range on
validation images (QDQ: the file holds pairs of QuantizeLinear and DequantizeLinear, which backends fuse). All else
stays in float32.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.common.progress import track
from mgcc_dist.common.words import counted
from mgcc_dist.data.datasets import subset_by_keys
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.splits import locate_split, read_split
from mgcc_dist.evaluation.metrics import score_image
from mgcc_dist.inference.config import ExportConfig
from mgcc_dist.inference.export_formats import FORMATS, INPUT, Metadata

RANGES = 64
"""images from which the ranges of activations are taken, evenly spaced"""
MEASURED = ("int8_images", "int8_iou", "float32_iou", "int8_iou_loss", "int8_differing_pixels")
"""keys of the metadata that the command measures"""


class ValImages(NamedTuple):
    """Labeled validation images."""

    samples: list[Sample]
    origin: Metadata
    """which they are"""


def as_input(image: np.ndarray) -> np.ndarray:
    """Return a grey image uint8 [H,W] as a graph takes it, uint8 [1,H,W,3]."""
    return np.repeat(image[None, ..., None], 3, axis=3)


def open_val_images(config: ExportConfig, info: dict[str, Any]) -> ValImages:
    """Read the validation images of `--split`, or of the split that the run was trained on.

    Raises:
        UserError: there is no such split or shard folder, or an image has no mask.
    """
    assert config.int8 is not None
    name = config.split or info.get("split")
    if name is None:
        raise UserError(f"--int8: needs validation images, and {config.run} does not say its split. Pass --split.")
    path = locate_split(name)
    keys = read_split(path).validation
    folder = ShardFolder.open(config.int8)
    samples = [subset[index] for subset in [subset_by_keys(folder, keys)] for index in range(len(subset))]
    if unmasked := [sample.key for sample in samples if sample.mask is None]:
        raise UserError(f"--int8 {config.int8}: {unmasked[0]!r} has no mask. Choose a --split of labeled images.")
    if not samples:
        raise UserError(f"--split {name}: has no validation images. Choose another --split.")
    origin = {"precision": "int8", "int8_shards": folder.index_sha256, "int8_split": sha256_of(path)}
    return ValImages(samples, origin)


def quantize(source: Path, target: Path, images: Sequence[np.ndarray]) -> None:
    """Write the float32 ONNX file `source` as INT8, with the ranges of activations on `images` uint8 [1,H,W,3]."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    chosen = np.unique(np.linspace(0, len(images) - 1, min(RANGES, len(images))).round().astype(int))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.indices = iter(track(chosen.tolist(), "calibrating", "images"))

        def get_next(self) -> dict[str, np.ndarray] | None:
            index = next(self.indices, None)
            return None if index is None else {INPUT: images[index]}

    logging.disable(logging.WARNING)  # it advises on the root logger to optimize the graph first, which changes nothing
    try:
        quantize_static(
            *(source, target, Reader()),
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.disable(logging.NOTSET)


def measure(float32: Path, int8: Path, images: ValImages) -> Metadata:
    """Return IoU of both files on the images and the share of pixels that differ: the keys MEASURED."""
    open_file = FORMATS["onnx"].open
    backends = [open_file(float32), open_file(int8)]
    scores, differing = [], []
    for sample in track(images.samples, "measuring INT8", "images"):
        assert sample.mask is not None
        masks = [run(as_input(sample.image))[0][0] for run in backends]
        scores.append([score_image(mask, sample.mask > 0, surface=False)["corrected"]["iou"] for mask in masks])
        differing.append(float((masks[0] != masks[1]).mean()))
    before, after = np.mean(scores, axis=0)
    values = (len(scores), f"{after:.4f}", f"{before:.4f}", f"{before - after:.4f}", f"{np.mean(differing):.5f}")
    return dict(zip(MEASURED, map(str, values), strict=True))


def check_loss(metadata: Metadata, limit: float) -> None:
    """Raise UserError if the measured loss of IoU is above `limit`."""
    if not float(metadata["int8_iou_loss"]) <= limit:
        images = counted(int(metadata["int8_images"]), "validation image")
        raise UserError(
            f"--int8: lowers the IoU of {images} from {metadata['float32_iou']} to {metadata['int8_iou']}, by more "
            f"than --max-iou-loss {limit:g}. Export in float32 (without --int8), or raise --max-iou-loss."
        )
