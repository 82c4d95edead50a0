"""CMU-Net: published parameter count and cost, and the order of its parts."""

import pytest
import torch
from fvcore.nn import FlopCountAnalysis

from mgcc_dist.models.cmunet import CMUNet
from mgcc_dist.models.config import CMUNetConfig
from mgcc_dist.models.mgcc import MGCC
from mgcc_dist.models.network import build_network

TINY = CMUNetConfig(widths=(2, 3, 4), mixer_layers=2, kernel_size=3)


def test_it_has_the_published_parameter_count():
    with torch.device("meta"):
        network = CMUNet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 49_932_353  # published: 49.93 M


def test_it_has_the_published_gmacs():
    # At a quarter of the side, for speed: every counted operation is proportional to the number of pixels.
    flops = FlopCountAnalysis(CMUNet().eval(), torch.zeros(1, 3, 64, 64)).unsupported_ops_warnings(False)
    assert round(flops.total() * 16 / 1e9, 2) == 91.10
    norms = flops.by_operator()["batch_norm"]  # the published count takes a multiplication and an addition as two
    assert round((flops.total() + norms) * 16 / 1e9, 2) == 91.25


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_have_the_images_size(training, channels):
    assert build_network(TINY).train(training)(torch.rand(2, channels, 16, 24)).shape == (2, 1, 16, 24)


def test_every_parameter_gets_a_gradient():
    network = build_network(TINY)
    network(torch.rand(2, 1, 16, 16)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_it_equals_mgcc_at_inference_with_the_same_number_of_mixer_layers():
    torch.manual_seed(0)
    network = build_network(TINY).eval()
    other = MGCC(widths=TINY.widths, taps=(2,), kernel_size=3, gates=(False, True)).inference_module().eval()
    other.load_state_dict({name.replace("decoder.", "main."): value for name, value in network.state_dict().items()})
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(network(images), other(images))


def test_config_sets_the_number_of_layers_and_their_kernels():
    network = build_network(TINY)
    assert len(network.mixer) == 2
    assert network.mixer[1].depthwise.kernel_size == (3, 3)
    assert len(build_network(CMUNetConfig(widths=(2, 4))).mixer) == 7
    assert network.inference_module() is network


def test_zero_mixer_layers_error_names_the_key():
    with pytest.raises(ValueError, match=r"mixer_layers must be at least 1, got 0"):
        CMUNetConfig(mixer_layers=0)
