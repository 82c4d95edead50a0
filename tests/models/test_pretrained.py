"""Pretrained encoders: their features, what networks make of them, and folders that hold none."""

import copy
import json
import socket
import sys

import pytest
import torch
from backbones import MEAN, MODELS, STD, WIDTHS, save_backbone
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from mgcc_dist.common.errors import UserError
from mgcc_dist.models.config import CCTConfig, CMUNetConfig, MGCCConfig, SwinUNetConfig, UNetConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.models.pretrained import backbone_weights, with_architecture

NETWORKS = {
    "unet": UNetConfig,
    "cmunet": CMUNetConfig,
    "cct": CCTConfig,
    "mgcc": MGCCConfig,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder and the model of each backbone, by name."""
    root = tmp_path_factory.mktemp("backbones")
    return {name: (root / name, save_backbone(root / name, name)) for name in MODELS}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A folder is read without asking the hub."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was used"))


def unet(folder, **keys):
    return build_network(UNetConfig(widths=WIDTHS, encoder=str(folder), **keys))


@pytest.mark.parametrize("name", MODELS)
def test_features_have_the_widths_and_the_strides_of_the_config(saved, name):
    config = UNetConfig(widths=WIDTHS, encoder=str(saved[name][0]))
    encoder = build_network(config).encoder
    features = encoder(torch.rand(2, 1, 64, 96) * 2 - 1)
    assert config.strides == (1, 2, 4, 8, 16, 32)
    assert [tuple(level.shape[1:]) for level in features] == [
        (width, 64 // stride, 96 // stride) for width, stride in zip(WIDTHS, config.strides, strict=True)
    ]
    assert all(level.min() >= 0 for level in features), "as those of the U-Net, for F-Drop"


@pytest.mark.parametrize("name", MODELS)
def test_the_backbone_computes_what_the_checkpoint_computes_on_normalized_repeated_images(saved, name):
    folder, model = saved[name]
    encoder = unet(folder).encoder.eval()
    seen = []
    encoder.backbone.register_forward_hook(lambda module, inputs, output: seen.extend([*inputs, *output]))
    pixels = torch.rand(2, 1, 64, 64)
    encoder(2 * pixels - 1)
    images, *stages = seen
    expected = torch.cat([(pixels - mean) / std for mean, std in zip(MEAN, STD, strict=True)], 1)
    torch.testing.assert_close(images, expected)
    outputs = model.base_model(expected, output_hidden_states=True)
    if name == "resnet":
        for stage, hidden in zip(stages, outputs.hidden_states[1:], strict=True):
            torch.testing.assert_close(stage, hidden)
    else:  # with a norm after each stage, which starts as the plain one
        deepest = (outputs.reshaped_hidden_states if name == "swin" else outputs.hidden_states)[-1]
        plain = torch.nn.functional.layer_norm(deepest.permute(0, 2, 3, 1), deepest.shape[1:2], eps=1e-5)
        torch.testing.assert_close(stages[-1], plain.permute(0, 3, 1, 2), rtol=1e-3, atol=1e-3)


def test_one_channel_images_give_the_logits_of_repeated_ones(saved):
    network, images = unet(saved["resnet"][0]).eval(), torch.rand(1, 1, 32, 64)
    torch.testing.assert_close(network(images), network(images.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("backbone", MODELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_of_every_network_is_trained(saved, name, backbone):
    """DDP waits for each gradient."""
    network = build_network(NETWORKS[name](widths=WIDTHS, encoder=str(saved[backbone][0])))
    output = network(torch.rand(2, 1, 64, 64))
    logits = [output[0], *output[1]] if isinstance(output, tuple) else [output]
    sum(each.square().mean() for each in logits).backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []
    assert network.training


@pytest.mark.parametrize("name", MODELS)
def test_a_network_is_rebuilt_from_its_config_and_weights_without_the_folder(tmp_path, name):
    save_backbone(tmp_path / "there", name)
    config = UNetConfig(widths=WIDTHS, encoder=str(tmp_path / "there"))
    network = build_network(config).eval()
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    rebuilt = build_network(with_architecture(config, network)).eval()
    rebuilt.load_state_dict(copy.deepcopy(network).state_dict())
    images = torch.rand(1, 1, 32, 32)
    torch.testing.assert_close(rebuilt(images), network(images), rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match=r"network\.encoder: .*there does not exist"):
        build_network(config)


def test_the_image_size_and_the_widths_must_fit_an_encoder(saved):
    folder = str(saved["resnet"][0])
    assert UNetConfig(widths=WIDTHS, encoder=folder).size_divisor == 32
    with pytest.raises(UserError, match=r"image_size: 48x32 does not fit the network\. It must be a multiple of 32"):
        unet(folder)(torch.zeros(1, 1, 32, 48))
    with pytest.raises(
        ValueError, match=r"widths must be 6 numbers with an encoder, .* got \(64, 128, 256, 512, 1024\)"
    ):
        UNetConfig(encoder=folder)
    with pytest.raises(ValueError, match="input_range must be unit with an encoder"):
        UNetConfig(widths=WIDTHS, encoder=folder, input_range="released")
    with pytest.raises(UserError, match=r"network\.in_channels: must be 3, the channels of the encoder, not 1"):
        unet(folder, in_channels=1)


def test_a_folder_without_normalization_gets_that_of_imagenet(tmp_path):
    save_backbone(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert unet(tmp_path).encoder.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false, "image_mean": [0.5, 0.5, 0.5]}')
    assert unet(tmp_path).encoder.std.flatten().tolist() == [1]


def without(name):
    return lambda folder: (folder / name).unlink()


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_a_patch_transformer(folder):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    ViTForImageClassification(config).save_pretrained(folder)


def with_three_stages(folder):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6, 8], depths=[1, 1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("config.json"), r"has no config\.json\. Save the backbone with save_pretrained"),
        (without("model.safetensors"), r"has no model\.safetensors"),
        (without_a_weight, r"lacks 1 weights of a resnet backbone, the first is encoder\.stages\.0\.layers\.0"),
        (with_a_patch_transformer, "transformers has no backbone for vit"),
        (with_three_stages, r"has levels of strides \[4, 8, 16\]\. Choose a backbone whose levels each halve"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_holds_no_fitting_backbone_is_one_clear_error(tmp_path, change, message):
    save_backbone(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=rf"network\.encoder: .*{message}"):
        unet(tmp_path)


def test_a_name_without_a_network_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = UNetConfig(widths=WIDTHS, encoder="nobody/nothing")
    assert backbone_weights(config) == []
    with pytest.raises(UserError, match=r"nobody/nothing is not a folder, and can't be downloaded .* Check the name"):
        build_network(config)
    assert backbone_weights(SwinUNetConfig()) == []


def test_a_backbone_of_timm_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"network\.encoder: it is a model of timm\. Run `pip install timm`"):
        unet(tmp_path)


def test_a_backbone_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet")
    keys = {"architecture": "test_resnet", "num_classes": model.num_classes}
    (tmp_path / "config.json").write_text(json.dumps(keys | {"pretrained_cfg": {"mean": MEAN, "std": STD}}))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = UNetConfig(widths=WIDTHS, encoder=str(tmp_path))
    network = build_network(config).eval()
    assert torch.equal(network.encoder.backbone.conv1[0].weight, model.conv1[0].weight)
    assert len(network.encoder.shallow) == 1, "timm's ResNets begin at stride 2"
    rebuilt = build_network(with_architecture(config, network)).eval()
    rebuilt.load_state_dict(network.state_dict())
    images = torch.rand(1, 1, 32, 32)
    assert torch.equal(rebuilt(images), network(images))
