"""Feature extractors: run folder, weights file, TorchScript file, default."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from mgcc_dist.assessment import features
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.loader import EvalLoader, Ranks
from mgcc_dist.inference.loading import header
from mgcc_dist.methods.config import MultiLevelCrossConsistencyConfig, SupervisedConfig
from mgcc_dist.methods.method import build
from mgcc_dist.models.config import MGCCConfig, SwinUNetConfig
from mgcc_dist.train.weights_file import save_weights


class MeanAndStd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.mean(dim=(1, 2, 3)), x.std(dim=(1, 2, 3))], dim=1)


class NotFinite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(1, 2, 3))[:, None] / 0


def scripted(module, path):
    torch.jit.script(module).save(path)
    return str(path)


def images_of(source, size):
    loader = EvalLoader(source, len(source), size, Ranks())
    return next(iter(loader.batches())).to("cpu").images


def test_a_run_folder_and_its_weights_file_give_pooled_encoder_features(tmp_path, phantom_shards, vae):
    torch.manual_seed(0)
    method, network = (
        MultiLevelCrossConsistencyConfig(),
        MGCCConfig(widths=(4, 8), taps=(1, 2), gates=(True, True, True)),
    )
    trained = build(method, network).predictor().eval()
    path = tmp_path / "run" / "best" / "model.safetensors"
    save_weights(trained.state_dict(), path, header(method, network, 32))
    for named in (tmp_path / "run", path):
        extractor = features.load(str(named), tmp_path, 16)
        extracted = extractor.extract(phantom_shards, Accelerator(cpu=True))
        with torch.no_grad():
            expected = trained.encoder(images_of(phantom_shards, 32))[-1].mean(dim=(2, 3))
        assert extracted.shape == (24, 8)
        np.testing.assert_allclose(extracted, expected.numpy(), rtol=1e-4, atol=1e-6)
        assert extractor.info["kind"] == "encoder of a segmentation run"


def test_default_is_the_last_activation_of_the_autoencoders_encoder(tmp_path, phantom_shards, vae):
    vae.save_pretrained(tmp_path / "vae")
    extractor = features.load(None, tmp_path / "vae", 16)
    with torch.no_grad():
        encoder, x = vae.encoder.eval(), images_of(phantom_shards, 16)
        x = encoder.conv_in(x)
        for block in encoder.down_blocks:
            x = block(x)
        expected = encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(x))).mean(dim=(2, 3))
    np.testing.assert_allclose(
        extractor.extract(phantom_shards, Accelerator(cpu=True)), expected.numpy(), rtol=1e-4, atol=1e-6
    )
    assert extractor.info["kind"] == "autoencoder's encoder"


def test_torchscript_features_come_in_the_order_of_the_images(tmp_path, phantom_shards):
    extractor = features.load(scripted(MeanAndStd(), tmp_path / "f.pt"), tmp_path, 16)
    expected = MeanAndStd()(images_of(phantom_shards, 16))
    np.testing.assert_allclose(extractor.extract(phantom_shards, Accelerator(cpu=True)), expected.numpy(), rtol=1e-5)


def test_files_and_networks_without_features_are_refused(tmp_path, phantom_shards):
    with pytest.raises(UserError, match=r"quality\.encoder: .*nowhere: does not exist\. Pass the folder of a finished"):
        features.load(str(tmp_path / "nowhere"), tmp_path, 16)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not hold a segmentation network"):
        features.load(str(tmp_path / "other.safetensors"), tmp_path, 16)
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match=r"text\.pt: is not a \.safetensors or TorchScript file"):
        features.load(str(tmp_path / "text.pt"), tmp_path, 16)
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickled.pt")
    with pytest.raises(UserError, match=r"is not a \.safetensors or TorchScript file"):
        features.load(str(tmp_path / "pickled.pt"), tmp_path, 16)
    maps = features.load(scripted(nn.Identity(), tmp_path / "maps.pt"), tmp_path, 16)
    with pytest.raises(
        UserError,
        match=r"maps\.pt returns \[16, 1, 16, 16\] for 16 images\. Use a network that returns features \[16, D\]",
    ):
        maps.extract(phantom_shards, Accelerator(cpu=True))
    infinite = features.load(scripted(NotFinite(), tmp_path / "nan.pt"), tmp_path, 16)
    with pytest.raises(UserError, match="not finite"):
        infinite.extract(phantom_shards, Accelerator(cpu=True))


def test_a_network_without_a_unet_encoder_is_refused(tmp_path):
    method = SupervisedConfig()
    network = SwinUNetConfig(embed_dim=4, depths=(1, 1), heads=(1, 1), window=2)
    path = tmp_path / "model.safetensors"
    save_weights(build(method, network).predictor().state_dict(), path, header(method, network, 32))
    with pytest.raises(UserError, match="holds a SwinUNet, which has no U-Net encoder"):
        features.load(str(path), tmp_path, 16)
