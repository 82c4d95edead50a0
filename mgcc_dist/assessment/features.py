"""Feature extractors for FID and KID, for the memorization audit and for curation.

The user names the network. By default it is the encoder of the diffusion model's own autoencoder. That one is always
available, but it has not been trained to recognize lesions, and it belongs to the model that generated the images. A
trained segmentation run is a better choice. Metrics of different extractors are not comparable, so every report names
the one it used.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from mgcc_dist.common.distributed import gather_by_index
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.data.datasets import SampleDataset
from mgcc_dist.data.loader import EvalLoader, Ranks
from mgcc_dist.diffusion import autoencoder
from mgcc_dist.diffusion.custom_autoencoder import CustomAutoencoder
from mgcc_dist.inference.encoders import load_encoder

BATCH_SIZE = 16
OPTION = "quality.encoder"


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network, images [B,1,S,S] in [-1,1] -> features [B,D]; `info` describes it in reports."""

    network: nn.Module
    image_size: int
    info: dict[str, Any]

    @torch.no_grad()
    def extract(self, dataset: SampleDataset, accelerator: Accelerator) -> np.ndarray:
        """Return the features float64 [N,D] of all images of `dataset`, in its order, on every rank. Collective.

        Raises:
            UserError: the network does not return one finite vector per image.
        """
        loader = EvalLoader(dataset, BATCH_SIZE, self.image_size, Ranks.of(accelerator))
        network, rows = self.network.to(accelerator.device), []
        with ProgressBar(len(dataset), "extracting features", "images", share=len(loader.indices)) as bar:
            for batch in bar.count(loader.batches(), lambda batch: len(batch.keys)):
                features = self._validated(network(batch.to(accelerator.device).images), len(batch.keys))
                rows += list(zip(batch.offsets.tolist(), features.double().cpu().numpy(), strict=True))
        return np.stack(gather_by_index(rows))

    @torch.no_grad()
    def check(self) -> None:
        """Run the network on two blank images.

        Raises:
            UserError: it fails, or does not return one finite vector per image.
        """
        try:
            features = self.network(torch.zeros(2, 1, self.image_size, self.image_size))
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{OPTION}: {self.info['file']} fails on images: {reason}") from error
        self._validated(features, 2)

    def _validated(self, features: Any, images: int) -> Tensor:
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != images:
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"{OPTION}: {self.info['file']} returns {got} for {images} images. "
                f"Use a network that returns features [{images}, D]"
            )
        if not features.isfinite().all():
            raise UserError(f"{OPTION}: {self.info['file']} returns features that are not finite")
        return features


def load(encoder: str | None, vae: Path, image_size: int) -> FeatureExtractor:
    """Load the feature extractor that `quality.encoder` names, or by default the encoder of the autoencoder in `vae`.

    `encoder` is the folder of a segmentation run, its model.safetensors, or a TorchScript file. Loading a TorchScript
    file executes code from it, so only pass files that you trust. `image_size` applies to the autoencoder and to
    TorchScript files; a segmentation network gets images of its training size.

    Raises:
        UserError: the file does not exist, or does not hold an encoder.
    """
    if encoder is None:
        pooled = _GlobalAveragePool(_autoencoder_features(vae))
        return _extractor("autoencoder's encoder", vae / SAFETENSORS_WEIGHTS_NAME, pooled, image_size)
    loaded = load_encoder(OPTION, encoder)
    network = loaded.network if loaded.image_size is None else _GlobalAveragePool(loaded.network)
    return _extractor(loaded.kind, loaded.file, network, loaded.image_size or image_size)


class _GlobalAveragePool(nn.Module):
    """Average the deepest feature maps [B,D,h,w] of `encoder` over their pixels."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        maps = self.encoder(images)
        return (maps[-1] if isinstance(maps, list) else maps).float().mean(dim=(2, 3))


class _LatentMean(nn.Module):
    def __init__(self, vae: CustomAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        return self.vae.encode(images).latent_dist.mean


def _autoencoder_features(folder: Path) -> nn.Module:
    """Return the encoder up to its last activation, images -> [B,channels[-1],h,w], without the latent projection.

    Other autoencoders than `AutoencoderKL` give the mean of their latents.
    """
    vae = autoencoder.load_pretrained(folder)
    if isinstance(vae, CustomAutoencoder):
        return _LatentMean(vae)
    encoder = vae.encoder
    encoder.conv_out = nn.Identity()
    return encoder


def _extractor(kind: str, file: Path, network: nn.Module, image_size: int) -> FeatureExtractor:
    info = {"kind": kind, "file": str(file), "sha256": sha256_of(file), "image_size": image_size}
    return FeatureExtractor(network.eval(), image_size, info)
