"""What two images are compared by beside their pixels: a feature vector of each, from a network that the user names.

Where none is named it is the encoder of the diffusion model's own autoencoder. That one is always at hand, but it never
learned what a lesion is, and it is the network that made the synthetic images; a trained segmentation run is better.
Figures of different features do not compare, so every report says what it was made with.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.data.loader import EvalLoader
from mgcc_dist.data.sources import Source
from mgcc_dist.diffusion import autoencoder
from mgcc_dist.inference.loading import load_network
from mgcc_dist.models.unet import Encoder

BATCH = 16  # images at once


@dataclass(frozen=True)
class Features:
    """A frozen network, images [B,1,S,S] in [-1,1] -> features [B,D], and what reports say of it."""

    network: nn.Module
    image_size: int
    facts: dict[str, Any]

    @torch.no_grad()
    def of(self, source: Source, accelerator: Accelerator) -> np.ndarray:
        """Features float64 [N,D] of all images of `source`, in its order, on every rank. Collective.

        Raises:
            UserError: the network does not give one finite vector an image.
        """
        rank, world = accelerator.process_index, accelerator.num_processes
        loader = EvalLoader(source, BATCH, self.image_size, rank=rank, world=world, workers=0)
        network, found = self.network.to(accelerator.device), []
        for batch in loader.batches():
            features = self._checked(network(batch.to(accelerator.device).images), len(batch.keys))
            found += list(zip(batch.positions.tolist(), features.double().cpu().numpy(), strict=True))
        return np.stack([row for _, row in sorted(gather_object(found), key=lambda one: one[0])])

    def _checked(self, features: Any, images: int) -> Tensor:
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != images:
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(f"{self.facts['file']} gives {got} for {images} images; features are [{images}, D]")
        if not features.isfinite().all():
            raise UserError(f"{self.facts['file']} gives features that are not finite numbers")
        return features


def load(encoder: str | None, vae: Path, image_size: int) -> Features:
    """The features that `quality.encoder` names; with None those of the autoencoder in `vae`, at `image_size`.

    `encoder` is the folder of a segmentation run, a model.safetensors of one, or a TorchScript file. The last is a
    program that torch.jit.load runs and unpickles, so it is read only because the user names it.

    Raises:
        UserError: there is no such file, or it holds no encoder.
    """
    if encoder is None:
        file = vae / "diffusion_pytorch_model.safetensors"
        return _features("autoencoder's encoder", file, _Pooled(_of_autoencoder(vae)), image_size)
    file = locate(encoder)
    if file.suffix == ".safetensors":
        network, trained_at = load_network(file)
        inner = getattr(network, "encoder", None)
        if not isinstance(inner, Encoder):
            raise UserError(f"{file} holds a {type(network).__name__}, without a U-Net's encoder; name another run")
        return _features("encoder of a segmentation run", file, _Pooled(inner), trained_at)
    try:
        script = torch.jit.load(file, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{file} is neither model.safetensors nor a TorchScript file ({first})") from error
    return _features("TorchScript file", file, script, image_size)


def locate(encoder: str) -> Path:
    """The file that `quality.encoder` stands for.

    Raises:
        UserError: it is not there.
    """
    path = Path(encoder)
    file = path / "best" / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"quality.encoder: {file} is not there; "
            "give the folder of a finished segmentation run, a model.safetensors, or a TorchScript file"
        )
    return file


class _Pooled(nn.Module):
    """The deepest feature maps [B,D,h,w] of `encoder`, averaged over their positions."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        maps = self.encoder(images)
        return (maps[-1] if isinstance(maps, list) else maps).float().mean(dim=(2, 3))


def _of_autoencoder(folder: Path) -> nn.Module:
    """The encoder as far as its last activation: images -> [B,channels[-1],h,w], before it is squeezed to a latent."""
    encoder = autoencoder.load_finished(folder).encoder
    encoder.conv_out = nn.Identity()
    return encoder


def _features(kind: str, file: Path, network: nn.Module, image_size: int) -> Features:
    facts = {"kind": kind, "file": str(file), "sha256": sha256_of(file), "image_size": image_size}
    return Features(network.eval(), image_size, facts)
