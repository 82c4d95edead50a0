"""Networks that the user names to compare images by: the encoder of a segmentation run, or any TorchScript file.

Weights are read from safetensors, which holds no code. Loading a TorchScript file executes code from it, so only pass
files that you trust.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.common.errors import UserError
from mgcc_dist.inference.loading import load_network
from mgcc_dist.models.pretrained import PretrainedEncoder
from mgcc_dist.models.unet import Encoder


@dataclass(frozen=True)
class LoadedEncoder:
    """A network for images [B,1,S,S] in [-1,1]. A run's encoder returns feature maps, a TorchScript file anything."""

    file: Path
    kind: str
    network: nn.Module
    image_size: int | None
    """S, that a run was trained at; None for a TorchScript file"""


def load_encoder(option: str, encoder: str) -> LoadedEncoder:
    """Load the network that `option` names: the folder of a segmentation run, its model.safetensors, or TorchScript.

    Raises:
        UserError: the file does not exist, or does not hold an encoder.
    """
    file = locate_encoder(option, encoder)
    if file.suffix == ".safetensors":
        network, trained_size = load_network(file)
        segmentation_encoder = getattr(network, "encoder", None)
        if not isinstance(segmentation_encoder, (Encoder, PretrainedEncoder)):
            raise UserError(
                f"{option}: {file} holds a {type(network).__name__}, which has no U-Net encoder. "
                "Choose a run of another network"
            )
        return LoadedEncoder(file, "encoder of a segmentation run", segmentation_encoder, trained_size)
    try:
        script = torch.jit.load(file, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{option}: {file}: is not a .safetensors or TorchScript file ({reason})") from error
    return LoadedEncoder(file, "TorchScript file", script, None)


def locate_encoder(option: str, encoder: str) -> Path:
    """Return the file that `option` refers to.

    Raises:
        UserError: it does not exist.
    """
    path = Path(encoder)
    file = path / "best" / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{option}: {file}: does not exist. "
            "Pass the folder of a finished segmentation run, a model.safetensors, or a TorchScript file"
        )
    return file


class FeatureMaps(nn.Module):
    """Images [B,1,S,S] in [-1,1] -> list of feature maps [B,D,h,w]; resized first to the size of the encoder's run."""

    def __init__(self, encoder: LoadedEncoder) -> None:
        super().__init__()
        self.network = encoder.network
        self.image_size = encoder.image_size

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.image_size not in (None, images.shape[-1]):
            images = F.interpolate(images, size=(self.image_size,) * 2, mode="bilinear", antialias=True)
        maps = self.network(images)
        return [maps] if isinstance(maps, Tensor) else list(maps)


def load_feature_maps(option: str, encoder: str, image_size: int) -> FeatureMaps:
    """Load the network of a feature loss for images of `image_size`, and try it on blank images.

    Raises:
        UserError: the file does not exist, holds no encoder, or the network does not return feature maps.
    """
    loaded = load_encoder(option, encoder)
    network = FeatureMaps(loaded).eval()
    try:
        with torch.no_grad():
            maps = network(torch.zeros(2, 1, image_size, image_size))
    except (RuntimeError, TypeError, torch.jit.Error) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{option}: {loaded.file} fails on images: {reason}") from error
    for features in maps:
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != 2 or not features.isfinite().all():
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"{option}: {loaded.file} returns {got} for 2 images. Use a network that returns finite feature maps "
                "[2, D, h, w], or a list of them"
            )
    return network
