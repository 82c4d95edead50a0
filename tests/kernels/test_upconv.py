"""The phase-wise up-convolution equals upsampling and convolving, values and gradients, at any size."""

import pytest
import torch

from mgcc_dist.kernels import reference
from mgcc_dist.kernels.upconv import upsample_conv


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 5), (8, 8), (7, 16)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_phase_wise_form_is_exact_with_its_gradients(size, with_bias):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64) if with_bias else None
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    ours, theirs = upsample_conv(*inputs), reference.upsample_conv(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(theirs)
    for mine, expected in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)
