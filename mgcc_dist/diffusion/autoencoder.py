"""First stage, Eq. 1: an autoencoder that encodes an image into a small latent, z = E(x), and decodes it, x̂ = D(z).

The network is diffusers' `AutoencoderKL` with one image channel. The loss is the mean squared error of the
reconstruction (Section IV-B.1) plus a small Kullback-Leibler term that keeps the latents close to N(0, 1) (the "VAE
[45]" of the paper); reconstruction.py has optional terms. After training the latents are normalized per channel: the
mean and standard deviation over the training images are folded into the weights of the two 1x1 convolutions next to the
latent, so the denoiser sees channels of mean 0 and variance 1. The paper does not mention this. Stable Diffusion [10],
on which it builds, divides all channels by one number. That leaves the channel means in place, and they cause an error
in the brightness of the samples.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.common.config import Layer, resolve
from mgcc_dist.common.distributed import gather_by_index, raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_object
from mgcc_dist.common.migration import current
from mgcc_dist.data.batch import Batch, ByteBatch
from mgcc_dist.diffusion.config import AUTOENCODERS, AutoencoderConfig, KLAutoencoderConfig, ReconstructionConfig
from mgcc_dist.diffusion.custom_autoencoder import CONFIG, CustomAutoencoder
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.diffusion.noise import RngStream, make_generators
from mgcc_dist.diffusion.reconstruction import Adversary, build_terms
from mgcc_dist.diffusion.weights import load_weights
from mgcc_dist.evaluation.spectra import GREY_LEVELS, radial_log_spectrum, spectral_distance, spectral_floor
from mgcc_dist.train.schedules import Progress

logger = logging.getLogger(__name__)
Autoencoder: TypeAlias = AutoencoderKL | CustomAutoencoder
LoadFeatures: TypeAlias = Callable[[str, str, int], nn.Module]
"""loads the network of the feature term: option, its file or folder, size S of images [B,1,S,S] -> list of maps"""


@dataclass(frozen=True)
class AutoencoderSection:
    """A config that has only an autoencoder."""

    autoencoder: AutoencoderConfig


def build(config: AutoencoderConfig, image_size: int) -> Autoencoder:
    """Return a new autoencoder with random weights.

    An implementation is called with the config and the image size. It returns an `AutoencoderKL`, or another module
    that `EncodesAndDecodes`.

    Raises:
        UserError: `image_size` is not a multiple of the downsampling factor.
    """
    if image_size % config.downsampling:
        raise UserError(
            f"data.image_size: {image_size} is not a multiple of {config.downsampling}, the downsampling factor of "
            f"autoencoder {config.name}"
        )
    network = AUTOENCODERS.load(config)(config, image_size)
    return network if isinstance(network, AutoencoderKL) else CustomAutoencoder(network, config, image_size)


def build_kl(config: KLAutoencoderConfig, image_size: int) -> AutoencoderKL:
    """Return an AutoencoderKL with random weights, for images [B,1,S,S] of `image_size` S."""
    levels = len(config.channels)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        mid_block_add_attention=config.attention,
        sample_size=image_size,
    )


def load(config: AutoencoderConfig, image_size: int, folder: Path) -> Autoencoder:
    """Return the autoencoder with the weights that the training loop saved in `folder`."""
    vae = build(config, image_size)
    load_weights(vae, folder / "model.safetensors")
    return vae.eval()


def load_pretrained(folder: Path) -> Autoencoder:
    """Return the autoencoder that `save_pretrained` wrote to `folder`.

    Unlike `from_pretrained`, this does not add the folder's path to the config.

    Raises:
        UserError: the weights are missing, damaged, or do not fit the config.
    """
    vae = _build_from(folder / CONFIG)
    load_weights(vae, folder / SAFETENSORS_WEIGHTS_NAME)
    return vae.eval()


def _build_from(path: Path) -> Autoencoder:
    """Return an autoencoder with random weights from a config.json, diffusers' or that of a `CustomAutoencoder`."""
    content = read_object(path)
    if "autoencoder" not in content:
        return AutoencoderKL.from_config(content)
    content = current(content, str(path))
    config = resolve(AutoencoderSection, [Layer({"autoencoder": content["autoencoder"]}, str(path))]).autoencoder
    return build(config, content["image_size"])


def latent_shape(vae: Autoencoder) -> tuple[int, int, int]:
    """Return the shape [C,h,w] of a latent."""
    if isinstance(vae, CustomAutoencoder):
        return vae.latent_shape
    size = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, size, size


class AutoencoderLoss(nn.Module):
    """The autoencoder together with its training loss.

    MSE is the mean over pixels. The KL divergence of q(z|x) from N(0, 1) is summed over the latent and divided by the
    number of pixels. The ratio of the two terms is the same as in Stable Diffusion and medfusion, which sum both over
    the image.
    """

    def __init__(
        self,
        vae: Autoencoder,
        kl_weight: float,
        losses: ReconstructionConfig | None = None,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        losses = losses or ReconstructionConfig()
        self.vae = vae
        self.kl_weight = kl_weight
        self.terms = build_terms(losses, features)
        self.adversary = Adversary(losses.adversarial) if losses.adversarial.weight else None

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the losses of `batch.images` [B,1,H,W] in [-1, 1]."""
        images = batch.images.to(self.vae.dtype)
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample(make_generators(progress.seed, RngStream.POSTERIOR, batch.offsets.tolist()))
        reconstruction = self.vae.decode(latents).sample
        mse = F.mse_loss(reconstruction, images)
        kl = posterior.kl().mean() / images[0].numel()
        loss = mse + self.kl_weight * kl
        values = {"mse": mse, "kl": kl}
        for name, (weight, term) in self.terms.items():
            values[name] = term(reconstruction, images)
            loss = loss + weight * values[name]
        if self.adversary:
            values |= self.adversary(reconstruction, images, progress.step)
            loss = loss + self.adversary.config.weight * values["adversarial"] + values["discriminator"]
        return {"loss": loss, **values}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the autoencoder's parameters and, with an adversarial term, those of the discriminator."""
        groups: list[dict[str, Any]] = [{"params": list(self.vae.parameters())}]
        return [*groups, self.adversary.parameter_group()] if self.adversary else groups


class AutoencoderTask:
    """Autoencoder, training images and validation images, for `train.loop.fit`."""

    name = "autoencoder"
    best_metric = "mse"
    best_is_higher = False

    def __init__(
        self,
        config: AutoencoderConfig,
        images: ImageData,
        accelerator: Accelerator,
        load_features: LoadFeatures | None = None,
    ) -> None:
        network, features = config.losses.network, None
        if network:
            assert load_features is not None, "losses.network needs a loader"
            with raise_on_all_ranks():
                features = load_features("autoencoder.losses.network", network, images.size)
        vae = build(config, images.size)
        self.module: nn.Module = AutoencoderLoss(vae, config.kl_weight, config.losses, features)
        self.loader = images.train_loader(config.batch, config.loop.seed, accelerator)
        self._val_loader = images.val_loader(config.batch, accelerator, in_step=True)
        self._val_groups = [images.shards.records[i].group for i in images.val.indices]

    def after_step(self, progress: Progress) -> None:
        pass

    def validate(self, module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Return metrics of the reconstructed validation images.

        Mean MSE (of images in [-1, 1]) and mean PSNR in dB, and the spectral distance in dB to the images, with the
        distance between halves of the images as floor.
        """
        assert isinstance(module, AutoencoderLoss)
        errors, spectra = [], []
        for batch in self._val_loader.batches():
            images = batch.to(accelerator.device).images
            with accelerator.autocast():
                reconstructed = reconstruct(module.vae, images)
            image_mse = (reconstructed.float() - images).square().mean(dim=(1, 2, 3))
            errors += list(zip(batch.offsets.tolist(), image_mse.tolist(), strict=True))
            rounded = reconstructed.float().mul(GREY_LEVELS).round().div(GREY_LEVELS)
            both = torch.cat([radial_log_spectrum(images), radial_log_spectrum(rounded)], dim=1)
            spectra += list(zip(batch.offsets.tolist(), both.detach().double().cpu().numpy(), strict=True))
        mse, rows = np.array(gather_by_index(errors)), np.stack(gather_by_index(spectra))
        real, reconstructions = np.split(rows, 2, axis=1)
        scores = {
            "mse": float(mse.mean()),
            "psnr": float(np.mean(10 * np.log10(4 / mse))),
            "spectral_distance": spectral_distance(real, reconstructions),
            "spectral_floor": spectral_floor(real, self._val_groups),
        }
        message = "autoencoder: PSNR %.2f dB, spectral distance %.2f dB (floor: %.2f dB)"
        logger.info(message, scores["psnr"], scores["spectral_distance"], scores["spectral_floor"])
        return scores

    def header(self) -> dict[str, str]:
        return {"program": "ldm", "stage": self.name}

    def network(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, AutoencoderLoss)
        return module.vae


def reconstruct(vae: Autoencoder, images: Tensor) -> Tensor:
    """Return D(E(x)) [B,1,H,W] in [-1, 1], using the mean of q(z|x) as the latent."""
    return vae.decode(vae.encode(images.to(vae.dtype)).latent_dist.mode()).sample.clamp(-1, 1)


@torch.no_grad()
def latent_moments(vae: Autoencoder, batches: Iterable[ByteBatch], accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation, float64 [C], of the latents over the images of all ranks. Collective.

    They are computed from the moments of the posterior, E[z²] = mean² + variance, without sampling.
    """
    moments = []
    for batch in batches:
        posterior = vae.encode(batch.to(accelerator.device).images).latent_dist
        mean, variance = posterior.mean.cpu().double(), posterior.var.cpu().double()
        first = mean.mean(dim=(2, 3)).tolist()
        second = (mean.square() + variance).mean(dim=(2, 3)).tolist()
        moments += list(zip(batch.offsets.tolist(), zip(first, second, strict=True), strict=True))
    rows = gather_by_index(moments)  # so that the sum does not depend on the number of ranks
    first, second = (torch.tensor(column).double().mean(dim=0) for column in zip(*rows, strict=True))
    return first, (second - first.square()).sqrt()


@torch.no_grad()
def normalize_latents(vae: Autoencoder, mean: Tensor, std: Tensor) -> None:
    """Replace the latent z by (z - mean) / std per channel, in place, without changing the reconstructions.

    `mean` and `std` are [C]. An AutoencoderKL's last convolution of the encoder outputs (mean, log-variance) and the
    decoder's first one takes z. Both are 1x1, so the map and its inverse fold into their weights. `scaling_factor`
    becomes 1.
    """
    if isinstance(vae, CustomAutoencoder):
        vae.normalize(mean, std)
        return
    mean, std = mean.double().to(vae.device), std.double().to(vae.device)
    decoder_conv = vae.post_quant_conv
    weight, bias = decoder_conv.weight.double(), decoder_conv.bias.double()
    decoder_conv.weight.copy_(weight * std[None, :, None, None])
    decoder_conv.bias.copy_(bias + weight[:, :, 0, 0] @ mean)

    encoder_conv = vae.quant_conv
    means, logvars = encoder_conv.weight.double().chunk(2)
    encoder_conv.weight.copy_(torch.cat([means / std[:, None, None, None], logvars]))
    means, logvars = encoder_conv.bias.double().chunk(2)
    encoder_conv.bias.copy_(torch.cat([(means - mean) / std, logvars - 2 * std.log()]))
    vae.register_to_config(scaling_factor=1.0)
