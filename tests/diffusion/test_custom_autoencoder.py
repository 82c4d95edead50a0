"""An autoencoder that is not diffusers' AutoencoderKL: latents, files, and all stages up to a sample."""

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from tiny_ldm import AUTOENCODER, DENOISER, LOOP, SAMPLING
from torch import nn

from mgcc_dist.assessment import features
from mgcc_dist.common.distributed import create_accelerator
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.diffusion import autoencoder, pipeline, sampling, stages
from mgcc_dist.diffusion.config import AUTOENCODERS, AutoencoderConfig, DataConfig

WIDTH, SIZE = 3, 16


@dataclass(frozen=True)
class PlainConfig(AutoencoderConfig):
    """Two convolutions."""

    name: Literal["plain_of_a_test"] = "plain_of_a_test"
    downsampling = 4


class Plain(nn.Module):
    def __init__(self, config, image_size):
        super().__init__()
        self.into = nn.Conv2d(1, 2 * config.latent_channels, 4, stride=4)
        self.out = nn.ConvTranspose2d(config.latent_channels, 1, 4, stride=4)

    def encode(self, images):
        return self.into(images).chunk(2, dim=1)

    def decode(self, latents):
        return self.out(latents)


@pytest.fixture
def config():
    AUTOENCODERS.register(PlainConfig, Plain)
    yield PlainConfig(loop=replace(LOOP, steps=2), latent_channels=WIDTH, batch=2)
    AUTOENCODERS._components.pop("plain_of_a_test")


@torch.no_grad()
def test_normalization_changes_the_latents_and_not_the_images(config, tmp_path):
    torch.manual_seed(0)
    vae, images = autoencoder.build(config, SIZE), torch.randn(4, 1, SIZE, SIZE)
    before = vae.encode(images).latent_dist
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    for _ in range(2):  # twice, as for an autoencoder that started from a normalized one
        autoencoder.normalize_latents(vae, mean, std)
    after = vae.encode(images).latent_dist
    shift, scale = (value[:, None, None] for value in (mean, std))
    torch.testing.assert_close(after.mean, ((before.mean - shift) / scale - shift) / scale)
    torch.testing.assert_close(after.std, before.std / scale**2)
    torch.testing.assert_close(vae.decode(after.mean).sample, vae.network.decode(before.mean))
    vae.save_pretrained(tmp_path / "vae")
    again = autoencoder.load_pretrained(tmp_path / "vae")
    assert torch.equal(again.encode(images).latent_dist.mean, after.mean)
    assert autoencoder.latent_shape(again) == (WIDTH, 4, 4)


def test_a_diffusion_model_is_trained_and_sampled(config, phantom_shards, tmp_path):
    data = DataConfig(shards=str(phantom_shards.folder), image_size=SIZE, workers=0)
    accelerator = create_accelerator()
    images = stages.open_images(data, tmp_path, accelerator)
    stages.train_autoencoder(config, data, images, tmp_path, accelerator)
    encoded = stages.encode_images(config, images, tmp_path, accelerator)
    assert encoded.shape == (WIDTH, 4, 4)
    second = replace(DENOISER, batch=2)
    stages.train_denoiser(second, data, images, encoded, tmp_path, accelerator)
    stages.save_pipeline(second, encoded, tmp_path, accelerator)
    folder = tmp_path / "pipeline"
    assert isinstance(pipeline.load(folder).vae.network, Plain)
    sampling.sample(SAMPLING, folder, tmp_path / "samples", accelerator)
    assert len(ShardFolder.open(tmp_path / "samples")) == SAMPLING.count
    extractor = features.load(None, folder / "vqvae", SIZE)
    assert extractor.network(torch.zeros(2, 1, SIZE, SIZE)).shape == (2, WIDTH)


def test_the_usual_autoencoder_is_diffusers_own():
    assert type(autoencoder.build(AUTOENCODER, SIZE)).__name__ == "AutoencoderKL"
