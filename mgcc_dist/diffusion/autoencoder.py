"""First stage, Eq. 1: an autoencoder that maps an image to a small latent, z = E(x), and back, x̂ = D(z).

It is diffusers' `AutoencoderKL` with one channel. Trained with the mean squared error of the reconstruction (Section
IV-B.1) plus a small Kullback-Leibler term that keeps the latents near N(0, 1) (the "VAE [45]" of the paper). When
training is over, its latents are standardised: the mean and standard deviation of each channel over the training images
are folded into the weights of the two 1x1 convolutions at the latent. The denoiser then sees channels of mean 0 and
variance 1, which the paper does not mention; Stable Diffusion [10], its base, divides all channels by one number, which
leaves their means in place and, with them, an error in the brightness of samples.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.loader import Batch, ByteBatch
from mgcc_dist.diffusion.config import AutoencoderConfig
from mgcc_dist.diffusion.images import Images
from mgcc_dist.diffusion.noise import Draw, generators
from mgcc_dist.diffusion.weights import load_weights
from mgcc_dist.train.schedules import Progress

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name


def build(config: AutoencoderConfig, image_size: int) -> AutoencoderKL:
    """A new autoencoder with random weights.

    Raises:
        UserError: `image_size` is not a multiple of the downsampling.
    """
    if image_size % config.downsampling:
        raise UserError(
            f"data.image_size {image_size} is not a multiple of {config.downsampling}, "
            f"by which {len(config.channels)} autoencoder.channels reduce it"
        )
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


def load(config: AutoencoderConfig, image_size: int, folder: Path) -> AutoencoderKL:
    """The autoencoder whose weights training saved in `folder`."""
    vae = build(config, image_size)
    load_weights(vae, folder / "model.safetensors")
    return vae.eval()


def load_finished(folder: Path) -> AutoencoderKL:
    """The standardised autoencoder that `save_pretrained` wrote to `folder`.

    Unlike with `from_pretrained`, the folder's path does not become a part of the config.
    """
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    load_weights(vae, folder / WEIGHTS)
    return vae.eval()


class AutoencoderLoss(nn.Module):
    """What the loop trains: the autoencoder with its loss.

    MSE is the mean over pixels. The KL divergence of q(z|x) from N(0, 1) is summed over an image's latent and divided
    by its pixels: the ratio of the two terms is that of Stable Diffusion and medfusion, which sum both over the image.
    """

    def __init__(self, vae: AutoencoderKL, kl_weight: float) -> None:
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Losses of `batch.images` [B,1,H,W] in [-1, 1]."""
        images = batch.images.to(self.vae.dtype)
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample(generators(progress.seed, Draw.POSTERIOR, batch.positions.tolist()))
        mse = F.mse_loss(self.vae.decode(latents).sample, images)
        kl = posterior.kl().mean() / images[0].numel()
        return {"loss": mse + self.kl_weight * kl, "mse": mse, "kl": kl}


class AutoencoderTask:
    """Autoencoder, training images and held-out images, for `train.loop.fit`."""

    name = "autoencoder"
    best_metric = "mse"
    best_is_higher = False

    def __init__(self, config: AutoencoderConfig, images: Images, accelerator: Accelerator) -> None:
        self.module: nn.Module = AutoencoderLoss(build(config, images.size), config.kl_weight)
        self.loader = images.training(config.batch, config.loop.seed, accelerator)
        self._held_out = images.held_out(config.batch, accelerator)

    def after_step(self, progress: Progress) -> None:
        pass

    def validate(self, module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Reconstruction of the held-out images: mean over images of MSE (range [-1, 1]) and of PSNR in dB."""
        assert isinstance(module, AutoencoderLoss)
        errors = []
        for batch in self._held_out.batches():
            images = batch.to(accelerator.device).images
            with accelerator.autocast():
                reconstructed = reconstruct(module.vae, images)
            squared = (reconstructed.float() - images).square().mean(dim=(1, 2, 3))
            errors += list(zip(batch.positions.tolist(), squared.tolist(), strict=True))
        mse = np.array([value for _, value in sorted(gather_object(errors))])
        return {"mse": float(mse.mean()), "psnr": float(np.mean(10 * np.log10(4 / mse)))}

    def header(self) -> dict[str, str]:
        return {"program": "ldm", "stage": self.name}

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        assert isinstance(module, AutoencoderLoss)
        return module.vae.state_dict()


def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """D(E(x)) [B,1,H,W] in [-1, 1], with the mean of q(z|x) as the latent."""
    return vae.decode(vae.encode(images.to(vae.dtype)).latent_dist.mode()).sample.clamp(-1, 1)


@torch.no_grad()
def latent_moments(vae: AutoencoderKL, batches: Iterable[ByteBatch], accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float64 [C], of the latents of the images of all ranks. Collective.

    The posterior's moments are used, E[z²] = mean² + variance, so nothing is drawn.
    """
    moments = []
    for batch in batches:
        posterior = vae.encode(batch.to(accelerator.device).images).latent_dist
        mean, variance = posterior.mean.cpu().double(), posterior.var.cpu().double()
        first = mean.mean(dim=(2, 3)).tolist()
        second = (mean.square() + variance).mean(dim=(2, 3)).tolist()
        moments += list(zip(batch.positions.tolist(), first, second, strict=True))
    in_order = sorted(gather_object(moments))
    first, second = (torch.tensor([row[which] for row in in_order]).double().mean(dim=0) for which in (1, 2))
    return first, (second - first.square()).sqrt()


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Replace the latent z by (z - mean) / std, channel by channel, without a change of what comes out.

    `mean` and `std` are [C]. The encoder's last convolution gives (mean, log-variance) and the decoder's first one
    takes z; both are 1x1, so the map and its inverse fold into their weights. `scaling_factor` becomes 1.
    """
    into, out_of = vae.quant_conv, vae.post_quant_conv
    mean, std = mean.double().to(vae.device), std.double().to(vae.device)
    weight, bias = out_of.weight.double(), out_of.bias.double()
    out_of.weight.copy_(weight * std[None, :, None, None])
    out_of.bias.copy_(bias + weight[:, :, 0, 0] @ mean)

    means, logvars = into.weight.double().chunk(2)
    into.weight.copy_(torch.cat([means / std[:, None, None, None], logvars]))
    means, logvars = into.bias.double().chunk(2)
    into.bias.copy_(torch.cat([(means - mean) / std, logvars - 2 * std.log()]))
    vae.register_to_config(scaling_factor=1.0)
