"""Segment images with a trained network: `mgcc.load(run).predict(image)`, and the batched core of `mgcc predict`.

The network sees each image as the square it was trained on (`data.fit`). Its probability is resized bilinearly to the
image's own size and thresholded at 0.5. For research use only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mgcc_dist.common.environment import has_bf16
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.finite import require_finite
from mgcc_dist.data.batch import normalize
from mgcc_dist.data.dicom import is_dicom, read_single_frame
from mgcc_dist.data.dicom_regions import Region
from mgcc_dist.data.geometry import Fit, fit_image, restore
from mgcc_dist.data.images import SUFFIXES, grey_from_array, grey_from_image, read_grey
from mgcc_dist.inference.loading import load_network, run_info
from mgcc_dist.kernels.dispatcher import Kernels, fuse
from mgcc_dist.train.initial_weights import find_weights

ImageLike = str | Path | Image.Image | np.ndarray
THRESHOLD = 0.5
BATCH = 8


class Prediction(NamedTuple):
    """The result for one image of height H and width W."""

    mask: np.ndarray
    """bool [H,W], True on the lesion"""
    probability: np.ndarray
    """float32 [H,W] in [0,1]; not calibrated"""


@dataclass(frozen=True)
class NetworkInput:
    """One image: `image` uint8 [H,W] and `square`, the same as the network sees it, uint8 [S,S]."""

    image: np.ndarray
    square: np.ndarray


class Predictor:
    """A trained segmentation network that takes images of any size.

    Args:
        network: images [B,1,S,S] in [-1,1] -> logits [B,1,S,S], in evaluation mode.
        image_size: S, the size it was trained at, in pixels.
        info: where the network comes from; kept as `info`.
        device: None takes the accelerator if there is one, else the CPU.
        precision: dtype of the convolutions: "bf16", "no" (float32), or "auto", bf16 where the device supports it.
        fit: how images become the square, as in training: "stretch", "letterbox" or "crop".
    """

    def __init__(
        self,
        network: nn.Module,
        image_size: int,
        info: dict[str, Any] | None = None,
        device: str | torch.device | None = None,
        precision: Literal["auto", "no", "bf16"] = "auto",
        fit: Fit = "stretch",
    ) -> None:
        self.network = network
        self.image_size = image_size
        self.info = info or {}
        """of a run: method, network, dataset, split, seed, images, scores, commit, weights, ..."""
        self.precision = precision
        self.fit: Fit = fit
        self.to(device or default_device())

    def __repr__(self) -> str:
        name = self.info.get("network", {}).get("name", type(self.network).__name__)
        weights = f", weights={self.info['weights']!r}" if "weights" in self.info else ""
        return f"Predictor({name}, image_size={self.image_size}, device={str(self.device)!r}{weights})"

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Move the network to `device`, in channels-last memory format, which makes convolutions faster."""
        self.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    @overload
    def predict(self, image: ImageLike) -> Prediction: ...

    @overload
    def predict(self, image: list[ImageLike] | tuple[ImageLike, ...]) -> list[Prediction]: ...

    def predict(self, image: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> Prediction | list[Prediction]:
        """Segment one image, or a batch.

        Args:
            image: a file, a PIL image, or an array of uint8 or uint16 pixels [H,W], [H,W,1], [H,W,3] or [H,W,4]; or a
                batch: a list or tuple of these, of any sizes, or one array [B,H,W,C]. Of DICOM of one frame the
                two-dimensional regions are segmented.

        Returns:
            A `Prediction` at the image's own size; a list of them for a batch.

        Raises:
            UserError: an image cannot be read, or an array has another shape or dtype.
        """
        if isinstance(image, (str, Path, Image.Image)) or (isinstance(image, np.ndarray) and image.ndim < 4):
            return self._predict([image])[0]
        return self._predict(list(image))

    def prepare(self, grey: np.ndarray) -> NetworkInput:
        """The input for a grey image uint8 [H,W]."""
        return NetworkInput(grey, fit_image(grey, self.image_size, self.fit))

    def probabilities(self, inputs: Sequence[NetworkInput], names: Sequence[object] | None = None) -> list[np.ndarray]:
        """Lesion probability, float32 [H,W] in [0,1], of each input at its own size; all inputs in one forward pass.

        Raises:
            UserError: the network's output is not finite; the message has the image's name or its index.
        """
        squares = self.squares([each.square for each in inputs], names)
        return [
            restore(square, (each.image.shape[0], each.image.shape[1]), self.fit).cpu().numpy()
            for each, square in zip(inputs, squares, strict=True)
        ]

    @torch.inference_mode()
    def squares(self, squares: Sequence[np.ndarray], names: Sequence[object] | None = None) -> list[Tensor]:
        """Lesion probability, float32 [S,S] in [0,1], of each square uint8 [S,S]; all squares in one forward pass.

        Raises:
            UserError: the network's output is not finite; the message has the image's name or its index.
        """
        if not squares:
            return []
        device, dtype = self.device, self.dtype
        images = torch.from_numpy(np.stack(squares))[:, None]  # [B,1,S,S]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = self.network(normalize(images.to(device)).contiguous(memory_format=torch.channels_last))
        items = names or [f"image {index}" for index in range(len(squares))]
        require_finite(logits, "network", items, "Use --precision no, or another run's weights.")
        return list(logits.float().sigmoid()[:, 0])

    @property
    def dtype(self) -> torch.dtype:
        """What convolutions compute in."""
        bf16 = has_bf16(self.device) if self.precision == "auto" else self.precision == "bf16"
        return torch.bfloat16 if bf16 else torch.float32

    def _predict(self, images: list[ImageLike]) -> list[Prediction]:
        read = [_read(image) for image in images]
        inputs = [self.prepare(grey[each.rows, each.columns]) for grey, regions in read for each in regions]
        batches = (inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH))
        probabilities = (probability for batch in batches for probability in self.probabilities(batch))
        return [_compose(grey.shape, regions, probabilities) for grey, regions in read]


def load(
    run_or_file: str | Path,
    weights: Literal["best", "last"] = "best",
    device: str | torch.device | None = None,
    precision: Literal["auto", "no", "bf16"] = "auto",
    kernels: Kernels = "auto",
) -> Predictor:
    """Load a trained segmentation network.

    Args:
        run_or_file: the folder of a `segment` run or of a model, a `model.safetensors`, or the name of a shipped model.
        weights: which weights of a run folder: those of the best validation score, or the last ones.
        device: None takes the accelerator if there is one, else the CPU.
        precision: dtype of the convolutions: "bf16", "no" (float32), or "auto", bf16 where the device supports it.
        kernels: implementations of the fused layers: "auto", "torch" or "triton".

    Raises:
        UserError: no such run or file, or it does not hold a network of this package.
    """
    path = find_weights(Path(run_or_file), weights)
    network, image_size = load_network(path)
    info = run_info(path)
    return Predictor(fuse(network, kernels), image_size, info, device, precision, info["fit"])


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _compose(shape: tuple[int, ...], regions: Sequence[Region], probabilities: Iterator[np.ndarray]) -> Prediction:
    """Return the prediction of an image from the probabilities of its regions; outside of them it is 0."""
    parts = [(region, next(probabilities)) for region in regions]
    probability = parts[0][1]
    if probability.shape != shape or len(parts) > 1:
        probability = np.zeros(shape, np.float32)
        for region, part in parts:
            view = probability[region.rows, region.columns]
            np.maximum(view, part, out=view)
    return Prediction(probability > THRESHOLD, probability)


def _read(image: ImageLike) -> tuple[np.ndarray, tuple[Region, ...]]:
    """Return the image uint8 [H,W] and the regions that are segmented."""
    if isinstance(image, (str, Path)) and Path(image).suffix.lower() not in SUFFIXES and is_dicom(Path(image)):
        return read_single_frame(Path(image))
    grey = _read_grey(image)
    return grey, (Region(slice(0, grey.shape[0]), slice(0, grey.shape[1]), None),)


def _read_grey(image: ImageLike) -> np.ndarray:
    if isinstance(image, (str, Path)):
        return read_grey(Path(image))
    if isinstance(image, Image.Image):
        return grey_from_image(image)
    if isinstance(image, np.ndarray):
        return grey_from_array(image)
    hint = ". Pass tensor.numpy() with pixels of uint8 or uint16" if isinstance(image, torch.Tensor) else ""
    raise UserError(f"predict: expected a file, a PIL image or a numpy array, got {type(image).__name__}{hint}")
