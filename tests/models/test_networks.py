"""U-Net and MGCC: the paper's parameter counts and cost, decoder inputs, configs, saved weights."""

import copy

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.phantom import draw
from mgcc_dist.inference.loading import header, load_predictor
from mgcc_dist.methods.config import SupervisedConfig
from mgcc_dist.methods.method import build
from mgcc_dist.models import mgcc as mgcc_module
from mgcc_dist.models.config import NETWORKS, CCTConfig, CMUNetConfig, MGCCConfig, SwinUNetConfig, UNetConfig
from mgcc_dist.models.mgcc import MGCC
from mgcc_dist.models.network import EncoderDecoder, build_network
from mgcc_dist.models.unet import UNet
from mgcc_dist.train.weights_file import save_weights

TINY = (2, 3, 4, 5)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(network_class, **arguments):
    with torch.device("meta"):
        return network_class(**arguments)


def test_mgcc_has_the_paper_s_parameter_counts():
    network = on_meta(MGCC)
    assert count(network) == 122_182_980
    assert count(network.inference_module()) == 52_142_145


def test_unet_has_the_paper_s_parameter_count():
    assert round(count(on_meta(UNet)) / 1e6, 2) == 34.53


def test_mgcc_without_gates_has_the_paper_s_parameter_count():
    network = on_meta(MGCC, gates=(False,) * 4)
    assert round(count(network.inference_module()) / 1e6, 2) == 44.47


def test_gates_are_switched_per_decoder():
    def gated(decoder):
        return any("gates" in name for name, _ in decoder.named_parameters())

    network = MGCC(widths=TINY, taps=(1, 2, 3), gates=(False, True, False, True))
    assert [gated(decoder) for decoder in network.auxiliary] == [False, True, False]
    assert gated(network.main)


@pytest.mark.parametrize(
    ("gates", "gmacs"), [((True,) * 4, 91.67), ((False,) * 4, 67.98)], ids=["with gates", "without gates"]
)
def test_mgcc_has_the_gmacs_of_the_paper(gates, gmacs):
    # At a quarter of the side, for speed: every counted operation is proportional to the number of pixels.
    network = MGCC(gates=gates).inference_module().eval()
    flops = FlopCountAnalysis(network, torch.zeros(1, 3, 64, 64)).unsupported_ops_warnings(False)
    assert round(flops.total() * 16 / 1e9, 2) == gmacs


@pytest.mark.parametrize("network", [UNet(widths=TINY), MGCC(widths=TINY, taps=(1, 2, 3))], ids=["unet", "mgcc"])
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_have_the_images_size(network, channels):
    assert network.eval()(torch.rand(2, channels, 24, 40)).shape == (2, 1, 24, 40)


def test_grey_images_are_repeated_to_the_network_s_channels():
    network, grey = UNet(widths=TINY).eval(), torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(network(grey), network(grey.repeat(1, 3, 1, 1)))


def test_the_released_input_range_leaves_less_than_half_of_the_deviation_after_the_first_batch_norm():
    """Its values are so small that the epsilon of BatchNorm counts: 0.44 to 0.56 on batches of BUSI, instead of 1."""
    pixels = np.stack([draw(seed=0, index=i, size=64).image for i in range(4)])
    images = torch.from_numpy(pixels)[:, None].float() / 127.5 - 1
    deviations = []
    for input_range in ("unit", "released"):
        torch.manual_seed(0)
        network = UNet(widths=(64, 128), input_range=input_range)
        first = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
        first.register_forward_hook(lambda module, inputs, output: deviations.append(output.std().item()))
        network(images)
    assert deviations[0] == pytest.approx(1, abs=0.02)
    assert 0.25 < deviations[1] < 0.5


@pytest.mark.parametrize("config", [UNetConfig, CMUNetConfig, MGCCConfig, CCTConfig])
def test_every_encoder_decoder_takes_the_released_input_range(config):
    unit = build_network(config(widths=(16, 4))).encoder
    released = build_network(config(widths=(16, 4), input_range="released")).encoder
    released.load_state_dict(unit.state_dict())
    images = torch.rand(1, 1, 16, 16) * 2 - 1
    found = released(images)[0]
    constants = zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)  # of Albumentations' Normalize
    channels = [((images + 1) / 2 - mean) / deviation / 255 for mean, deviation in constants]
    torch.testing.assert_close(found, unit(torch.cat(channels, 1))[0], rtol=0, atol=1e-3)
    assert not torch.allclose(found, unit(images)[0], atol=0.1)


def test_image_size_that_is_not_a_multiple_is_a_clear_error():
    with pytest.raises(UserError, match=r"image_size: 20x16 does not fit the network\. It must be a multiple of 8"):
        UNet(widths=TINY)(torch.rand(1, 1, 16, 20))


def test_training_gives_main_and_k_auxiliary_logits():
    for taps in ((4,), (1, 3), (1, 2, 3, 5, 6)):
        network = MGCC(widths=TINY, taps=taps, gates=(True,) * (len(taps) + 1))
        main, auxiliary = network(torch.rand(2, 1, 16, 16))
        assert len(network.mixer) == taps[-1]
        assert [logits.shape for logits in (main, *auxiliary)] == [(2, 1, 16, 16)] * (len(taps) + 1)


def test_evaluation_runs_only_the_main_decoder_on_clean_features():
    torch.manual_seed(0)
    network = MGCC(widths=TINY, taps=(1, 2, 3))
    for decoder in network.auxiliary:
        decoder.register_forward_hook(lambda *_: pytest.fail("an auxiliary decoder ran"))
    network.eval()
    images = torch.rand(2, 1, 16, 16)
    *skips, bottleneck = network.encoder(images)
    for layer in network.mixer:
        bottleneck = layer(bottleneck)
    expected = network.main([*skips, bottleneck])
    torch.testing.assert_close(network(images), expected)
    torch.testing.assert_close(network.inference_module()(images), expected)


def seen_by_decoders(network, images):
    """Input features of each decoder by its name, and the encoder's output, in training mode."""
    seen = {}

    def remember(name):
        return lambda _module, inputs: seen.__setitem__(name, [feature.detach().clone() for feature in inputs[0]])

    hooks = [network.main.register_forward_pre_hook(remember("main"))]
    hooks += [d.register_forward_pre_hook(remember(k)) for k, d in enumerate(network.auxiliary)]
    network.train()(images)
    for hook in hooks:
        hook.remove()
    return seen


class Increment(nn.Module):
    """Replaces a mixer layer: adds 1, so that the value counts the layers."""

    def forward(self, x):
        return x + 1


def replace_layers(run, layer):
    for number in range(len(run)):
        run[number] = layer()


@pytest.mark.parametrize("taps", [(3, 6, 9), (2, 5, 9), (4,), (1, 2, 4, 8)])
def test_each_decoder_taps_its_number_of_mixer_layers(taps, monkeypatch):
    monkeypatch.setattr(mgcc_module, "PERTURBATIONS", (lambda x: x,) * 3)
    network = MGCC(widths=TINY, taps=taps, gates=(True,) * (len(taps) + 1))
    replace_layers(network.mixer, Increment)
    images = torch.rand(2, 1, 16, 16)
    seen = seen_by_decoders(network, images)
    layers = [0, *taps[:-1]]
    clean = network.encoder(images)[-1]
    for k, passed in enumerate(layers):
        torch.testing.assert_close(seen[k][-1], clean + passed)
    torch.testing.assert_close(seen["main"][-1], clean + taps[-1])


def test_perturbations_cycle_through_f_drop_dropout_f_noise():
    network = MGCC(widths=TINY, taps=(1, 2, 3, 4), gates=(True,) * 5)
    replace_layers(network.mixer, nn.Identity)
    seen = seen_by_decoders(network, torch.rand(2, 1, 16, 16))
    for level, clean in enumerate(seen["main"]):
        dropped, thinned, noisy, again = (seen[k][level] for k in range(4))
        for feature in (dropped, again):  # F-Drop: a position keeps all its channels as they are, or none
            kept = (feature == clean).all(dim=1)
            assert (kept | (feature == 0).all(dim=1)).all()
        assert (thinned.isclose(clean / 0.7) | (thinned == 0)).all()
        ratio = (noisy / clean)[clean > 1e-6]
        assert ratio.min() >= 0.7
        assert ratio.max() <= 1.3
        assert not torch.equal(noisy, clean)


def test_bottleneck_perturbation_leaves_the_skips_clean():
    network = MGCC(widths=TINY, taps=(1, 2, 3), perturb="bottleneck")
    replace_layers(network.mixer, nn.Identity)
    seen = seen_by_decoders(network, torch.rand(2, 1, 32, 32))
    for k in range(3):
        assert all(torch.equal(skip, clean) for skip, clean in zip(seen[k][:-1], seen["main"][:-1], strict=True))
        assert not torch.equal(seen[k][-1], seen["main"][-1])


def test_inference_module_shares_weights_and_keys_with_the_full_network():
    network = MGCC(widths=TINY, taps=(1, 2, 3))
    part, whole = network.inference_module().state_dict(), network.state_dict()
    assert part.keys() == {name for name in whole if not name.startswith("auxiliary.")}
    assert all(part[name].data_ptr() == whole[name].data_ptr() for name in part)


def test_inference_module_does_not_change_the_training_mode():
    network = MGCC(widths=TINY, taps=(1, 2, 3)).train()
    network.inference_module()
    assert all(module.training for module in network.modules())


def test_state_dict_keys_match_saved_files():
    keys = MGCC(widths=TINY, taps=(1, 2, 3)).state_dict().keys()
    assert {name.partition(".")[0] for name in keys} == {"encoder", "mixer", "main", "auxiliary"}
    for name in (
        "encoder.blocks.0.conv1.weight",
        "encoder.blocks.3.norm2.running_var",
        "mixer.2.depthwise.weight",
        "mixer.0.depthwise_norm.weight",
        "mixer.0.pointwise.bias",
        "mixer.0.pointwise_norm.bias",
        "main.ups.0.conv.weight",
        "main.ups.0.norm.weight",
        "main.gates.2.pointwise.weight",
        "main.gates.2.ordinary_norm.weight",
        "main.gates.2.dilated.bias",
        "main.gates.2.vote.weight",
        "main.gates.2.vote_norm.bias",
        "main.blocks.1.conv2.weight",
        "main.head.bias",
        "auxiliary.2.head.weight",
    ):
        assert name in keys
    assert {name.partition(".")[0] for name in UNet(widths=TINY).state_dict()} == {"encoder", "decoder"}


def test_config_sets_every_argument_of_the_network():
    config = MGCCConfig("mgcc", 1, (2, 4), "released", None, None, (1, 3), 5, (False, False, True), "bottleneck")
    network = build_network(config)
    assert network.encoder.blocks[0].conv1.weight.shape == (2, 1, 3, 3)
    assert network.mixer[0].depthwise.kernel_size == (5, 5)
    assert (len(network.mixer), len(network.auxiliary)) == (3, 2)
    assert not network.perturb_skips
    assert network.encoder.input_range == "released"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("in_channels", 0),
        ("widths", (8,)),
        ("widths", (8, 0)),
        ("taps", ()),
        ("taps", (6, 3)),
        ("taps", (0, 3)),
        ("taps", (3, 3, 9)),
        ("kernel_size", 6),
        ("kernel_size", -1),
        ("gates", (True, True)),
    ],
)
def test_invalid_value_error_names_the_key(key, value):
    with pytest.raises(ValueError, match=rf"{key} .* got "):
        MGCCConfig(**{key: value})


SMALL = {
    "unet": UNetConfig(widths=(2, 4)),
    "cmunet": CMUNetConfig(widths=(2, 4), mixer_layers=2),
    "mgcc": MGCCConfig(widths=(2, 4), taps=(1, 2), gates=(False, True, True), perturb="bottleneck"),
    "cct": CCTConfig(widths=(2, 4), perturb="bottleneck"),
    "swin_unet": SwinUNetConfig(embed_dim=4, depths=(1, 2), heads=(1, 2), window=2, drop_path=0.1),
}


def test_every_network_is_tested_here():
    assert list(SMALL) == NETWORKS.names()


@pytest.mark.parametrize("name", SMALL)
def test_capabilities_are_those_of_the_network(name):
    config = SMALL[name]
    network = build_network(config).train()
    output = network(torch.rand(2, 1, 2 * config.size_divisor, config.size_divisor))
    assert (len(output[1]) if isinstance(output, tuple) else 0) == config.auxiliary_outputs
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == config.has_batch_norm
    assert isinstance(network, EncoderDecoder) == config.has_encoder_features
    with pytest.raises(UserError, match="does not fit the network"):
        network(torch.rand(2, 1, config.size_divisor, config.size_divisor + 1))


@pytest.mark.parametrize("name", SMALL)
def test_each_network_reloads_from_its_saved_weights(name, tmp_path):
    torch.manual_seed(0)
    method, config = SupervisedConfig(), SMALL[name]
    predictor = build(method, config).predictor().eval()
    save_weights(predictor.state_dict(), tmp_path / "best" / "model.safetensors", header(method, config, 16))
    loaded, size = load_predictor(tmp_path)
    images = torch.rand(1, 1, 16, 16)
    assert size == 16
    assert torch.equal(loaded(images), predictor(images))


@pytest.mark.parametrize("name", SMALL)
def test_each_network_survives_deepcopy_and_half_precision(name):
    network = copy.deepcopy(build_network(SMALL[name])).bfloat16().eval()
    assert network(torch.rand(1, 1, 16, 32).bfloat16()).shape == (1, 1, 16, 32)


def test_a_network_whose_config_promises_encoder_features_has_them(monkeypatch):
    monkeypatch.setattr(CCTConfig, "has_encoder_features", True)
    with pytest.raises(UserError, match="network cct: has_encoder_features is True, but it is not an EncoderDecoder"):
        build_network(CCTConfig(widths=(4, 8)))
