"""The ConvMixer layer and the gate against Eq. 3 to 6 written out; the perturbations' distributions."""

import pytest
import torch
from torch.nn import functional as F

from mgcc_dist.models.blocks import (
    MSAG,
    ConvMixerLayer,
    FusedCatReLU,
    UpConv,
    _drawn,
    dropout,
    feature_dropout,
    feature_noise,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def shuffled(module):
    """In evaluation mode and float64, with norms that do something."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.1
    return module.double().eval()


def norm(x, bn):
    scale = bn.weight / (bn.running_var + 1e-5).sqrt()
    return (x - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]


def test_mixer_layer_is_eq_3_and_4():
    layer, x = shuffled(ConvMixerLayer(3, 5)), torch.randn(2, 3, 7, 6, dtype=torch.float64)
    padded = F.pad(x, (2, 2, 2, 2))
    depthwise = torch.zeros_like(x) + layer.depthwise.bias[:, None, None]
    for i in range(5):
        for j in range(5):
            depthwise = depthwise + padded[:, :, i : i + 7, j : j + 6] * layer.depthwise.weight[:, 0, i, j, None, None]

    def gelu(y):
        return 0.5 * y * (1 + torch.erf(y / 2**0.5))

    middle = norm(gelu(depthwise), layer.depthwise_norm) + x
    pointwise = torch.einsum("oc,bchw->bohw", layer.pointwise.weight[:, :, 0, 0], middle)
    expected = norm(gelu(pointwise + layer.pointwise.bias[:, None, None]), layer.pointwise_norm)
    torch.testing.assert_close(layer(x), expected)


def test_gate_is_eq_5_and_6_with_a_norm_after_the_vote():
    gate, x = shuffled(MSAG(3)), torch.randn(2, 3, 8, 6, dtype=torch.float64)
    wide = torch.zeros(3, 3, 5, 5, dtype=torch.float64)  # a 3x3 kernel of dilation 2 is a 5x5 kernel with holes
    wide[:, :, ::2, ::2] = gate.dilated.weight
    joined = torch.cat(
        [
            norm(F.conv2d(x, gate.pointwise.weight, gate.pointwise.bias), gate.pointwise_norm),
            norm(F.conv2d(x, gate.ordinary.weight, gate.ordinary.bias, padding=1), gate.ordinary_norm),
            norm(F.conv2d(x, wide, gate.dilated.bias, padding=2), gate.dilated_norm),
        ],
        dim=1,
    ).clamp(min=0)
    vote = norm(F.conv2d(joined, gate.vote.weight, gate.vote.bias), gate.vote_norm)
    torch.testing.assert_close(gate(x), x / (1 + torch.exp(-vote)) + x)


def test_joined_relu_is_relu_of_the_joined_maps_and_its_gradients_are_dense():
    torch.manual_seed(0)
    maps = [torch.randn(2, c, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last) for c in (3, 1, 2)]
    gradient = torch.randn(2, 6, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    ours, theirs = ([each.clone().requires_grad_() for each in maps] for _ in range(2))
    joined, expected = FusedCatReLU.apply(*ours), torch.cat(theirs, dim=1).relu()
    assert torch.equal(joined, expected)
    for got, want in zip(
        torch.autograd.grad(joined, ours, gradient), torch.autograd.grad(expected, theirs, gradient), strict=True
    ):
        assert torch.equal(got, want)
        assert got.is_contiguous(memory_format=torch.channels_last)  # BN's backward is many times slower on slices


def test_up_convolution_upsamples_before_it_convolves():
    up, x = shuffled(UpConv(2, 3)), torch.randn(1, 2, 3, 4, dtype=torch.float64)
    larger = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = norm(F.conv2d(larger, up.conv.weight, up.conv.bias, padding=1), up.norm).clamp(min=0)
    torch.testing.assert_close(up(x), expected)


def test_feature_noise_is_one_tensor_in_range_for_the_whole_batch():
    x = torch.rand(4, 8, 16, 16, dtype=torch.float64) + 1
    noise = feature_noise(x) / x - 1
    assert noise.min() >= -0.3
    assert noise.max() <= 0.3
    torch.testing.assert_close(noise, noise[:1].expand_as(noise))
    assert noise[0].mean().abs() < 0.02  # 2048 draws of standard deviation 0.173
    assert noise[0].std() == pytest.approx(0.6 / 12**0.5, rel=0.05)


def test_feature_dropout_keeps_pixels_below_the_threshold():
    # channel mean of image 0 is 0.00 to 0.99 in steps of 0.01, that of image 1 ten times as high
    ramp = torch.arange(100, dtype=torch.float64).view(1, 1, 10, 10) / 100
    x = torch.cat([ramp, 10 * ramp]) * torch.tensor([0.5, 1.5]).view(1, 2, 1, 1)
    counts = set()
    for _ in range(200):
        dropped = feature_dropout(x)
        kept = dropped == x
        assert (dropped[~kept] == 0).all()
        assert torch.equal(kept[:, 0], kept[:, 1])
        assert torch.equal(kept[0], kept[1])  # the threshold follows each image's own highest value
        number = int(kept[0, 0].sum())
        assert kept[0, 0].flatten()[:number].all()  # the least active ones
        counts.add(number)
    # the threshold 0.99 * U(0.7, 0.9) lies between 0.693 and 0.891
    assert min(counts) >= 70
    assert max(counts) <= 90
    assert len(counts) > 15


def test_dropout_zeroes_30_percent_of_elements_and_keeps_the_expectation():
    x = torch.full((4, 8, 32, 32), 2.0)
    dropped = dropout(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 2 / 0.7])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert dropped.mean().item() == pytest.approx(2.0, abs=0.05)
    assert not torch.equal(dropped[0, 0], dropped[0, 1])
    assert not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize("perturb", [feature_noise, feature_dropout, dropout])
def test_perturbation_depends_only_on_the_seed(perturb):
    def perturbed(seed):
        torch.manual_seed(seed)
        return perturb(torch.linspace(0, 1, 2 * 4 * 24 * 24).view(2, 4, 24, 24))

    assert torch.equal(perturbed(1), perturbed(1))
    assert not torch.equal(perturbed(1), perturbed(2))


@pytest.mark.parametrize("perturb", [feature_noise, feature_dropout, dropout])
def test_perturbation_does_not_depend_on_the_memory_layout(perturb):
    def perturbed(x):
        torch.manual_seed(1)
        return perturb(x)

    x = torch.rand(2, 4, 8, 8)
    torch.testing.assert_close(perturbed(x.to(memory_format=torch.channels_last)), perturbed(x))


def test_masks_off_the_cpu_have_the_layout_of_the_maps_and_the_same_order_of_draws():
    drawn = []

    def draw(shape):
        drawn.append(tuple(shape))
        return torch.empty(shape, device="meta")

    x = torch.empty(2, 3, 5, 4, device="meta")
    for layout in (torch.contiguous_format, torch.channels_last):
        maps = x.to(memory_format=layout)
        assert _drawn(draw, x.shape, maps).is_contiguous(memory_format=layout)
        assert _drawn(draw, x.shape[1:], maps)[None].is_contiguous(memory_format=layout)
    assert drawn == 2 * [(2, 5, 4, 3), (5, 4, 3)]


@pytest.mark.parametrize("perturb", [feature_noise, feature_dropout, dropout])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_perturbation_keeps_dtype_and_shape(perturb, dtype):
    x = torch.rand(2, 4, 8, 8).to(dtype)
    assert (perturb(x).dtype, perturb(x).shape) == (dtype, x.shape)
