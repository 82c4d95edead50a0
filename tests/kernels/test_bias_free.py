"""Training without the biases before BatchNorm equals training with them, and checkpoints are interchangeable."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from mgcc_dist.kernels import FusedUpConv, bias_free
from mgcc_dist.models.blocks import MSAG, DoubleConv, UpConv
from mgcc_dist.models.config import MGCCConfig
from mgcc_dist.models.network import build_network

EXACT = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


@pytest.fixture
def leave_out(monkeypatch):
    """Leave biases out on a CPU too, or add them."""
    return lambda left_out: monkeypatch.setattr(bias_free, "DEVICES", ("cpu",) if left_out else ())


def randomized(module):
    """Give biases and norms values with which a difference would be visible; return it in float64."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.dim() == 1 and "running_var" not in name:
            nn.init.normal_(tensor, 0.5, 0.5)
    return module.double().train()


def biases_before_norms(module):
    """Return the names of the parameters whose gradient is zero: all biases of convolutions."""
    return {f"{name}.bias" for name, each in module.named_modules() if isinstance(each, nn.Conv2d)}


@pytest.mark.parametrize("make", [DoubleConv, UpConv, FusedUpConv, lambda channels, _: MSAG(channels)])
@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_gradients_and_statistics_stay_equal(make, compiled, leave_out):
    torch.manual_seed(0)
    plain = randomized(make(4, 3))
    free = copy.deepcopy(plain)
    images = [torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    results = []
    for module, left_out in ((plain, False), (free, True)):
        leave_out(left_out)
        call = torch.compile(module, backend="aot_eager", fullgraph=True) if left_out and compiled else module
        outputs = [call(x) for x in images]  # two forward passes before the backward
        loss = sum(y.square().sum() for y in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [*images, *module.parameters()])])
    EXACT(results[1], results[0])
    EXACT(free.state_dict(), plain.state_dict())
    names = ["", "", "", "", *(name for name, _ in free.named_parameters())]
    zero = {name for name, gradient in zip(names, results[1], strict=True) if not gradient.any()}
    assert zero == biases_before_norms(free)


def test_a_checkpoint_of_a_run_with_biases_is_resumed_without_them(leave_out, monkeypatch):
    """With weight decay, which shrinks biases, so they need a gradient."""
    monkeypatch.setattr("mgcc_dist.models.mgcc.perturbed", lambda features, perturb, perturb_skips: list(features))
    torch.manual_seed(0)
    config = MGCCConfig(in_channels=1, widths=(4, 6), taps=(1,), gates=(True, True), kernel_size=3)
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64)

    def train(state, steps):
        network = build_network(config).double().train()
        optimizer = torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=0.1)
        network.load_state_dict(state[0])
        if state[1]:
            optimizer.load_state_dict(copy.deepcopy(state[1]))  # it keeps the tensors
        for _ in range(steps):
            main, auxiliary = network(images)
            sum(logits.square().mean() for logits in (main, *auxiliary)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return copy.deepcopy(network.state_dict()), copy.deepcopy(optimizer.state_dict()), network

    leave_out(False)
    first = train((randomized(build_network(config)).state_dict(), None), 2)
    expected = train(first, 2)
    leave_out(True)
    resumed = train(first, 2)
    EXACT(resumed[0], expected[0])
    with torch.no_grad():
        EXACT(resumed[2].eval()(images), expected[2].eval()(images))


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.eval(),
        lambda block: block.norm1.eval(),
        lambda block: setattr(block.norm1, "momentum", None),
        lambda block: setattr(block, "norm1", nn.GroupNorm(1, 3)),
        lambda block: setattr(block.conv1, "bias", None),
    ],
)
def test_a_bias_that_matters_is_added(change, leave_out):
    leave_out(True)
    block = DoubleConv(2, 3)
    change(block)
    assert bias_free.bias_is_needed(torch.ones(1, 2, 4, 4), block.conv1, block.norm1)


def test_biases_are_left_out_on_a_gpu_only():
    block = DoubleConv(2, 3)
    with FakeTensorMode():
        on_cpu, on_gpu = (torch.empty(1, 2, 4, 4, device=device) for device in ("cpu", "cuda"))
    assert bias_free.bias_is_needed(on_cpu, block.conv1, block.norm1)  # its convolution adds it without a pass
    assert not bias_free.bias_is_needed(on_gpu, block.conv1, block.norm1)
