"""Stock diffusers loads the saved folder and generates the same images from the same noise."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DModel
from tiny_ldm import DENOISER, LOOP, SHAPE
from torch import nn

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of, write_json
from mgcc_dist.diffusion import denoiser, pipeline
from mgcc_dist.diffusion.condition import Condition
from mgcc_dist.diffusion.config import DENOISERS, DenoiserConfig
from mgcc_dist.diffusion.denoiser import predict
from mgcc_dist.diffusion.noise import RngStream, make_generators
from mgcc_dist.diffusion.sampler import Sampler, initial_noise
from mgcc_dist.train.weights_file import save_weights


@pytest.mark.parametrize(
    ("change", "solver"),
    [
        ({}, "ddim"),
        ({"objective": "v_prediction", "zero_terminal_snr": True}, "ddim"),
        ({"objective": "flow"}, "dpm_solver++"),
    ],
)
def test_stock_diffusers_generates_the_same_images_from_the_same_noise(vae, unet, tmp_path, change, solver):
    pipeline_folder = tmp_path / "p"
    pipeline.save(vae, unet, replace(DENOISER, **change), {}, {}, pipeline_folder)
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    assert {library for library, _ in (value for value in index.values() if isinstance(value, list))} == {"diffusers"}
    stock = DiffusionPipeline.from_pretrained(pipeline_folder)
    pictures = stock(batch_size=2, generator=make_generators(3, RngStream.SAMPLE, [4, 5]), num_inference_steps=5).images
    noise = initial_noise(3, [4, 5], SHAPE)
    ours = Sampler(pipeline.load(pipeline_folder), solver, 5, 1.0, False, False, torch.device("cpu")).generate(noise)
    assert np.abs(np.stack([np.asarray(picture) for picture in pictures]).astype(int) - ours).max() <= 1
    assert np.ptp(ours) > 0


def test_ddim_written_out_generates_the_same_image(pipeline_folder):
    """DDIM (Song et al. 2021, Eq. 12 with σ = 0), computed with the components that diffusers loads."""
    vae = AutoencoderKL.from_pretrained(pipeline_folder / "vqvae").double()
    unet = UNet2DModel.from_pretrained(pipeline_folder / "unet").double()
    scheduler = DDIMScheduler.from_pretrained(pipeline_folder / "scheduler")
    alpha_bar = scheduler.alphas_cumprod.double()
    [generator] = make_generators(3, RngStream.SAMPLE, [4])
    z = torch.randn(1, 2, 4, 4, generator=generator).double()
    steps = list(range(999, 0, -200))
    with torch.no_grad():
        for t, following in zip(steps, [*steps[1:], None], strict=True):
            now, then = alpha_bar[t], alpha_bar[following] if following is not None else torch.tensor(1.0)
            noise = unet(z, t).sample
            z = then.sqrt() * (z - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise
        expected = (vae.decode(z / 1.7).sample / 2 + 0.5).clamp(0, 1)[0, 0].numpy()
    sampler = Sampler(pipeline.load(pipeline_folder), "ddim", 5, 1.0, False, False, torch.device("cpu"))
    image = sampler.generate(initial_noise(3, [4], SHAPE))
    np.testing.assert_allclose(image[0], expected * 255, atol=0.51)


def test_trained_weights_are_linked_and_what_a_full_disk_left_is_removed(vae, unet, tmp_path):
    (tmp_path / ".p.saving" / "unet").mkdir(parents=True)
    (tmp_path / ".p.saving" / "unet" / "half.safetensors").touch()
    save_weights(vae.state_dict(), tmp_path / "vae.safetensors", {"step": 1})
    save_weights(unet.state_dict(), tmp_path / "unet.safetensors", {"step": 1})
    weights = {
        pipeline.LDM.vae_weights: tmp_path / "vae.safetensors",
        pipeline.LDM.denoiser_weights: tmp_path / "unet.safetensors",
    }
    pipeline.save(vae, unet, DENOISER, {}, {}, tmp_path / "p", weights)
    assert all((tmp_path / "p" / name).samefile(path) for name, path in weights.items())
    assert not list(tmp_path.rglob("half.safetensors"))
    assert not (tmp_path / ".p.saving").exists()
    stock = DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert torch.equal(stock.unet.conv_in.weight, unet.conv_in.weight)


def test_fingerprint_follows_weights_and_settings(pipeline_folder):
    before = pipeline.fingerprint(pipeline_folder)
    path = pipeline_folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("0.012", "0.013"))
    assert pipeline.fingerprint(pipeline_folder) != before


def test_with_classes_the_folder_loads_and_any_class_samples_by_plain_diffusers(vae, tmp_path):
    torch.manual_seed(1)
    config = replace(DENOISER, classes=True)
    unet = denoiser.build(config, SHAPE, 3)
    counts = {"benign": 5, "malignant": 2, "normal": 1}
    pipeline.save(vae, unet, config, counts, {}, tmp_path / "p")
    model = pipeline.load(tmp_path / "p")
    assert model.classes == counts

    stock = DiffusionPipeline.from_pretrained(tmp_path / "p")
    with pytest.raises(ValueError, match="class_labels should be provided"):
        stock(batch_size=1, num_inference_steps=1)
    stock.unet = pipeline.unconditional_unet(stock.unet)
    z = torch.randn(2, *SHAPE)
    any_class = model.unet(z, 7, torch.tensor([3, 3])).sample
    torch.testing.assert_close(stock.unet(z, 7).sample, any_class, rtol=1e-5, atol=1e-6)
    assert stock(batch_size=1, num_inference_steps=2).images[0].size == (16, 16)


def test_components_of_different_models_are_refused_by_name(pipeline_folder, vae, unet, tmp_path):
    unet_folder, vae_folder = pipeline_folder / "unet", pipeline_folder / "vqvae"
    kept = {path: path.read_bytes() for path in pipeline_folder.rglob("*") if path.is_file()}

    denoiser.build(DENOISER, (3, 4, 4), 0).save_pretrained(unet_folder)
    with pytest.raises(UserError, match="takes latents of 3 channels and 4x4 pixels, but vqvae/ produces 2 channels"):
        pipeline.load(pipeline_folder)

    denoiser.build(replace(DENOISER, channels=(8, 16)), SHAPE, 0).save_pretrained(tmp_path / "wider")
    weights = "diffusion_pytorch_model.safetensors"
    (unet_folder / "config.json").write_bytes(kept[unet_folder / "config.json"])
    (unet_folder / weights).write_bytes((tmp_path / "wider" / weights).read_bytes())
    with pytest.raises(UserError, match=r"cannot be loaded .*size mismatch"):
        pipeline.load(pipeline_folder)

    (unet_folder / weights).write_bytes(kept[unet_folder / weights][:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        pipeline.load(pipeline_folder)
    (unet_folder / weights).unlink()
    with pytest.raises(UserError, match=f"unet/{weights}: does not exist"):
        pipeline.load(pipeline_folder)

    (unet_folder / weights).write_bytes(kept[unet_folder / weights])
    write_json(pipeline_folder / "source.json", {"autoencoder": sha256_of(vae_folder / weights)})
    pipeline.load(pipeline_folder)
    with torch.no_grad():
        vae.quant_conv.bias += 1
    vae.save_pretrained(vae_folder)
    with pytest.raises(UserError, match="is not the autoencoder on whose latents unet/ was trained"):
        pipeline.load(pipeline_folder)


@pytest.mark.parametrize("name", pipeline.LDM.files)
def test_a_pipeline_whose_files_changed_is_not_taken_for_another_model(pipeline_folder, name):
    """Without this, a truncated file counts as other weights, and samples of it are written to another folder."""
    source = json.loads((pipeline_folder / "source.json").read_text())
    source.pop("files")
    assert pipeline.is_up_to_date(source, pipeline_folder)
    assert not pipeline.is_up_to_date(source | {"denoiser": "other"}, pipeline_folder)
    path = pipeline_folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name}: is damaged, or was changed since .* Move the folder elsewhere"):
        pipeline.is_up_to_date(source, pipeline_folder)
    (pipeline_folder / "source.json").write_text("{")
    assert not pipeline.is_up_to_date(source, pipeline_folder)


@dataclass(frozen=True)
class LinearConfig(DenoiserConfig):
    """One 1x1 convolution, as a plugin's denoiser."""

    name: str = "linear"
    bias: bool = True


class Linear(nn.Module):
    def __init__(self, config, shape, labels):
        super().__init__()
        self.conv = nn.Conv2d(shape[0], shape[0], 1, bias=config.bias)
        self.labels = nn.Embedding(labels, shape[0])

    def forward(self, latents, timestep, condition):
        return self.conv(latents) + self.labels(condition.labels)[..., None, None]


def test_a_denoiser_of_a_plugin_is_saved_loaded_and_sampled(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(DENOISERS, "_components", dict(DENOISERS._components))
    DENOISERS.register(LinearConfig, Linear)
    config = LinearConfig(LOOP, classes=True, bias=False)
    saved = denoiser.build(config, SHAPE, 2)
    counts = {"benign": 2, "malignant": 1}
    pipeline.save(vae, saved, config, counts, {}, tmp_path / "p")
    model = pipeline.load(tmp_path / "p")
    assert (model.classes, model.latent_shape) == (counts, SHAPE)
    z, t, condition = torch.randn(2, *SHAPE), torch.tensor(5), Condition(torch.tensor([0, 2]))
    assert torch.equal(predict(model.unet, z, t, condition), predict(saved, z, t, condition))
    images = Sampler(model, "ddim", 2, 3.0, False, False, torch.device("cpu")).generate(z, condition)
    assert images.shape == (2, 16, 16)

    del DENOISERS._components["linear"]
    with pytest.raises(
        UserError, match=r"unet/config\.json: denoiser\.name: expected one of unet, dit, got 'linear'\. .*--import"
    ):
        pipeline.load(tmp_path / "p")
