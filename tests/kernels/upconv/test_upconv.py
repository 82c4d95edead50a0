"""The phase up-convolution equals upsampling and convolution, in values and gradients, at any size."""

import copy

import pytest
import torch

from mgcc_dist.kernels import FusedUpConv, reference
from mgcc_dist.kernels.upconv import spec
from mgcc_dist.kernels.upconv.phases import phase_weights, upsample_conv
from mgcc_dist.kernels.upconv.spec import triton_unsupported_reason, unsupported_reason
from mgcc_dist.models.blocks import UpConv


def block(channels, out, seed=0):
    """Return a plain block in evaluation mode whose norm is not the identity."""
    torch.manual_seed(seed)
    module = UpConv(channels, out).eval()
    for tensor in (module.norm.weight, module.norm.bias, module.norm.running_mean):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(module.norm.running_var, 0.5, 2)
    return module


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 5), (8, 8), (7, 16)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_phase_convolutions_and_gradients_are_exact(size, with_bias, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=layout)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64) if with_bias else None
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    ours, expected_output = upsample_conv(*inputs), reference.upsample_conv(*inputs)
    torch.testing.assert_close(ours, expected_output, rtol=1e-12, atol=1e-12)
    grad_output = torch.randn_like(expected_output)
    for actual, expected in zip(
        torch.autograd.grad(ours, inputs, grad_output),
        torch.autograd.grad(expected_output, inputs, grad_output),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_phase_weights_keep_the_memory_format():
    for layout in (torch.contiguous_format, torch.channels_last):
        kernels = phase_weights(torch.randn(4, 3, 3, 3).to(memory_format=layout))
        assert kernels.shape == (2, 2, 4, 3, 2, 2)
        assert kernels.flatten(0, 2).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("training", [True, False])
def test_fused_module_matches_the_plain_one(training):
    plain = block(3, 4).double().train(training)
    fused = FusedUpConv.from_module(copy.deepcopy(plain))
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())  # running statistics


@torch.no_grad()
def test_cached_weights_follow_every_change_of_parameters_and_statistics():
    plain = block(2, 3)
    fused = FusedUpConv.from_module(plain)
    x = torch.randn(1, 2, 4, 4)
    fused(x)
    changes = [
        lambda: plain.conv.weight.add_(1),
        lambda: plain.norm.running_mean.add_(1),
        lambda: plain.load_state_dict(block(2, 3, seed=1).state_dict()),
        lambda: (fused.train(), plain.conv.weight.data.mul_(2), fused.eval(), plain.eval()),
        lambda: fused.double(),
    ]
    for change in changes:
        change()
        x = x.to(plain.conv.weight.dtype)
        torch.testing.assert_close(fused(x), plain(x))


def test_autocast_folds_in_float32_and_is_as_accurate_as_the_plain_block():
    plain = block(32, 16)
    fused, exact = FusedUpConv.from_module(plain), copy.deepcopy(plain).double()
    x = torch.randn(2, 32, 8, 8)
    for training in (False, True):
        for module in (plain, fused, exact):
            module.train(training)
        with torch.set_grad_enabled(training):
            reference_output = exact(x.double())
            with torch.autocast("cpu", torch.bfloat16):
                assert phase_weights(plain.conv.weight).dtype == torch.float32
                ours, expected_output = fused(x), plain(x)
        assert ours.dtype == expected_output.dtype
        assert (ours.double() - reference_output).norm() <= 1.5 * (expected_output.double() - reference_output).norm()


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", [(1, 16, 32, 3, 5), (2, 64, 16, 9, 8)])
@torch.no_grad()
def test_triton_kernel_matches_float64(dtype, tolerance, shape):
    batch, channels, out, height, width = shape
    plain = block(channels, out)
    x = torch.randn(batch, channels, height, width).to(dtype)
    assert triton_unsupported_reason(plain, x) is None
    reference_output = copy.deepcopy(plain).double()(x.double())
    ours = FusedUpConv.from_module(plain, "triton")(x)
    assert ours.dtype == dtype
    assert ours.shape == reference_output.shape
    assert (ours.double() - reference_output).norm() <= tolerance * reference_output.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_triton_kernel_on_a_gpu_is_as_accurate_as_eager(dtype):
    plain = block(128, 64).cuda()
    x = torch.randn(3, 128, 31, 17, device="cuda").to(dtype)
    reference_output = copy.deepcopy(plain).double()(x.double())
    ours, expected_output = FusedUpConv.from_module(plain, "triton")(x), copy.deepcopy(plain).to(dtype)(x)
    assert (ours.double() - reference_output).norm() <= 1.5 * (expected_output.double() - reference_output).norm()


def test_unsupported_reasons(monkeypatch):
    x = torch.randn(1, 4, 2, 2)
    module = block(4, 4)
    assert unsupported_reason(module, x) is None
    assert "gradients" in triton_unsupported_reason(module, x)
    with torch.no_grad():
        reason = triton_unsupported_reason(module, x.double())
        assert "float64" in reason or "device is cpu" in reason
    monkeypatch.setattr(spec, "unsupported_device_reason", lambda device: None)
    with torch.no_grad(), torch.device("meta"):
        assert "32-bit offsets" in triton_unsupported_reason(block(64, 64), torch.empty(1, 64, 8192, 4096))
    module.conv = torch.nn.Conv2d(4, 4, 5, padding=2)
    assert "3x3" in unsupported_reason(module, x)
