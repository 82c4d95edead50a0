"""The references compute the same as the networks' own modules, with the parameters as arguments."""

import torch

from mgcc_dist.kernels import reference
from mgcc_dist.models.blocks import MSAG, ConvMixerLayer


def randomized(module):
    """Randomize a module whose norms then are not the identity; return it in float64 and training mode."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double().train()


def norm(layer):
    return layer.weight, layer.bias


def test_convmixer_layer_matches_the_network_module():
    layer = randomized(ConvMixerLayer(6, kernel_size=5))
    x = torch.randn(3, 6, 7, 9, dtype=torch.float64)
    ours = reference.convmixer_layer(
        x,
        layer.depthwise.weight,
        layer.depthwise.bias,
        norm(layer.depthwise_norm),
        layer.pointwise.weight,
        layer.pointwise.bias,
        norm(layer.pointwise_norm),
    )
    torch.testing.assert_close(ours, layer(x), rtol=1e-12, atol=1e-12)


def test_msag_matches_the_network_module():
    gate = randomized(MSAG(4))
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)

    def arguments(name):
        convolution = getattr(gate, name)
        return convolution.weight, convolution.bias, *norm(getattr(gate, f"{name}_norm"))

    ours = reference.msag(x, [arguments("pointwise"), arguments("ordinary"), arguments("dilated")], arguments("vote"))
    torch.testing.assert_close(ours, gate(x), rtol=1e-12, atol=1e-12)
