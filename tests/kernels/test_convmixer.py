"""The fused ConvMixer layers against the network's own in float64; through the interpreter, and on a GPU if asked."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mgcc_dist.kernels import convmixer, convmixer_backward, convmixer_launch
from mgcc_dist.models.blocks import ConvMixerLayer

# Relative error of the norm. The interpreter's bf16 stores truncate, which doubles their error.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CANCELLATION = 20  # times that for gradients of biases and norms: sums over the batch that nearly cancel


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


def layers(number=1, channels=2, size=7):
    """Layers in training mode with norms that do something."""
    torch.manual_seed(0)
    run = nn.Sequential(*(ConvMixerLayer(channels, size) for _ in range(number))).train()
    for layer in run:
        for norm in (layer.depthwise_norm, layer.pointwise_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return run


def pair(run, dtype):
    """The fused run, its parameters rounded to `dtype`, and the plain one in float64, of equal values."""
    fused = copy.deepcopy(run)
    for parameter in fused.parameters():
        parameter.data = parameter.data.to(dtype).to(torch.float64 if dtype == torch.float64 else torch.float32)
    exact = copy.deepcopy(fused).double()
    return convmixer.FusedConvMixer.from_module(fused.double() if dtype == torch.float64 else fused), exact


def check_step(fused, exact, x, tolerance):
    """Outputs, gradients and running statistics of one training step."""
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = fused(ours), exact(theirs)
    assert error(y.detach(), expected.detach()) < tolerance
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert error(ours.grad, theirs.grad) < 3 * tolerance
    for (name, parameter), reference in zip(fused.named_parameters(), exact.parameters(), strict=True):
        factor = 3 if parameter.ndim == 4 else CANCELLATION
        assert error(parameter.grad, reference.grad) < factor * tolerance, name
    for (name, buffer), reference in zip(fused.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), reference.double(), rtol=10 * tolerance, atol=tolerance, msg=name)


@pytest.mark.interpreted
@pytest.mark.parametrize("size", [3, 5, 7, 9, 11, 13])
def test_step_of_two_layers_equals_the_network_s_for_every_kernel_size(size):
    fused, exact = pair(layers(2, size=size), torch.float32)
    check_step(fused, exact, torch.randn(3, 2, 16, 16), TOLERANCE[torch.float32])


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_step_in_half_precision(dtype):
    fused, exact = pair(layers(), dtype)
    check_step(fused, exact, torch.randn(3, 2, 16, 16).to(dtype), TOLERANCE[dtype])


@pytest.mark.interpreted
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (5, 32, 16), (3, 32, 32), (40, 16, 16)])
def test_step_at_other_shapes_resident_and_in_groups(batch, height, width):
    fused, exact = pair(layers(2), torch.float64)
    check_step(fused, exact, torch.randn(batch, 2, height, width, dtype=torch.float64), TOLERANCE[torch.float64])


@pytest.mark.interpreted
def test_step_as_launched_on_gfx942(monkeypatch):
    """Its backward takes a launch for each stage."""
    monkeypatch.setattr(convmixer_backward, "target_of", lambda device: "gfx942")
    fused, exact = pair(layers(2, size=3), torch.float64)
    check_step(fused, exact, torch.randn(3, 2, 32, 32, dtype=torch.float64), TOLERANCE[torch.float64])


@pytest.mark.interpreted
def test_gradients_are_those_of_finite_differences():
    fused, _ = pair(layers(2, size=5), torch.float64)
    x = torch.randn(1, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in fused.named_parameters()]

    def step(x, *parameters):
        return torch.func.functional_call(fused, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(step, (x, *fused.parameters()), fast_mode=True, nondet_tol=0.0)


@pytest.mark.interpreted
def test_gradients_reach_every_tapped_output():
    fused, exact = pair(layers(3), torch.float64)
    x = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    taps = fused.outputs(ours)
    expected = [theirs]
    for layer in exact:
        expected.append(layer(expected[-1]))
    upstream = [torch.randn_like(x) for _ in range(2)]
    (gradient,) = torch.autograd.grad((taps[0] * upstream[0] + taps[2] * upstream[1]).sum(), ours)
    (reference,) = torch.autograd.grad((expected[1] * upstream[0] + expected[3] * upstream[1]).sum(), theirs)
    assert error(gradient, reference) < 1e-12


@pytest.mark.interpreted
def test_large_mean_with_tiny_variance_keeps_its_variance():
    z = 1000 + 1e-2 * torch.randn(2, 10, 16, 16)
    zero, one = torch.zeros(2), torch.ones(2)
    _, stats = convmixer.norm(z, zero, one, zero, 1e-5, "")
    values = z.double().transpose(0, 1)
    torch.testing.assert_close(stats[1].double(), values.var(dim=(0, 2, 3), unbiased=False), rtol=1e-3, atol=0)


@pytest.mark.interpreted
def test_every_element_is_written(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    try:
        fused, exact = pair(layers(2), torch.float32)
        check_step(fused, exact, torch.randn(9, 2, 16, 16), TOLERANCE[torch.float32])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.interpreted
def test_two_runs_agree_bit_by_bit():
    def run():
        fused, _ = pair(layers(), torch.float32)
        torch.manual_seed(1)
        x = torch.randn(9, 2, 16, 16, requires_grad=True)
        y = fused(x)
        y.square().sum().backward()
        return [y, x.grad, *(parameter.grad for parameter in fused.parameters()), *fused.buffers()]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_evaluation_of_three_layers_is_the_network_s(dtype):
    run = layers(3)
    with torch.no_grad():
        run(torch.randn(4, 2, 16, 16) + 1)  # running statistics that are not the initial ones
        fused, exact = pair(run.eval(), dtype)
        x = torch.randn(3, 2, 16, 16).to(dtype)
        assert error(fused(x), exact(x.double())) < 2 * TOLERANCE[dtype]


@pytest.mark.interpreted
def test_autocast_computes_in_its_type_and_keeps_fp32_gradients():
    fused, exact = pair(layers(), torch.bfloat16)
    x = torch.randn(2, 2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x)
    assert y.dtype == torch.bfloat16
    assert error(y.detach(), exact(x.double()).detach()) < 2 * TOLERANCE[torch.bfloat16]
    y.sum().backward()
    assert {parameter.grad.dtype for parameter in fused.parameters()} == {torch.float32}


@pytest.mark.interpreted
@pytest.mark.parametrize("with_norm", [False, True])
def test_operator_obeys_torch_s_rules(with_norm):
    torch.manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, requires_grad=True)

    pre = (make(2), make(2), make(2)) if with_norm else (None, None, None)
    arguments = (make(2, 2, 16, 16), *pre, 1e-5, make(2, 1, 3, 3), make(2), make(2), make(2), 1e-5, "")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(convmixer.mix, arguments, test_utils=checks)


@pytest.mark.interpreted
def test_compiles_whole_with_the_same_result():
    fused, exact = pair(layers(), torch.float32)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    check_step(compiled, exact, torch.randn(2, 2, 16, 16), TOLERANCE[torch.float32])


@pytest.mark.interpreted
def test_state_dict_is_the_same():
    run = layers(2)
    fused = convmixer.FusedConvMixer.from_module(run)
    assert list(fused.state_dict()) == list(run.state_dict())
    assert all(mine is theirs for mine, theirs in zip(fused.parameters(), run.parameters(), strict=True))


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (ConvMixerLayer(2, 7), (1, 2, 15, 16), "planes"),
        (ConvMixerLayer(2, 15), (1, 2, 16, 16), "kernel"),
        (ConvMixerLayer(2, 7).eval(), (1, 2, 16, 16), "gradients"),
    ],
)
def test_what_is_not_supported_says_why(layer, shape, reason):
    assert reason in convmixer.supported(layer, torch.randn(shape))
    with pytest.raises(ValueError, match=reason):
        convmixer.FusedConvMixerLayer.from_module(layer)(torch.randn(shape))


def test_without_a_gpu_and_interpreter_says_why():
    if convmixer.INTERPRETED:
        pytest.skip("this process interprets")
    assert convmixer.supported(ConvMixerLayer(2, 7), torch.randn(1, 2, 16, 16)) == "device cpu"


def test_statistics_of_ranks_merge_to_those_of_all_values():
    torch.manual_seed(0)
    parts = [100 + torch.randn(3, count, dtype=torch.float64) for count in (5, 80, 11)]
    counts = torch.tensor([[part.shape[1]] for part in parts], dtype=torch.float64)
    means = torch.stack([part.mean(1) for part in parts])
    variances = torch.stack([part.var(1, unbiased=False) for part in parts])
    merged = convmixer_launch.merge_statistics(counts, means, variances)
    values = torch.cat(parts, 1)
    expected = torch.stack([values.mean(1), values.var(1, unbiased=False), values.var(1)])
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.multiprocess
def test_two_ranks_with_synchronised_norms_equal_one_with_the_whole_batch(tmp_path):
    exact = layers(2, size=5).double()
    x = torch.randn(5, 2, 16, 16, dtype=torch.float64)
    upstream = torch.randn_like(x)
    torch.save({"state": exact.state_dict(), "x": x, "upstream": upstream}, tmp_path / "given")
    script = Path(__file__).with_name("mix_on_ranks.py")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            script,
            tmp_path / "given",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    ranks = [torch.load(tmp_path / f"given.{rank}", weights_only=True) for rank in (0, 1)]
    x.requires_grad_()
    y = exact(x)
    y.backward(upstream)
    assert error(torch.cat([rank["y"] for rank in ranks]), y.detach()) < 1e-12
    assert error(torch.cat([rank["dx"] for rank in ranks]), x.grad) < 1e-12
    for gradient, parameter in zip(ranks[0]["gradients"], exact.parameters(), strict=True):
        assert error(gradient, parameter.grad) < 1e-11
    for rank in ranks:
        for buffer, reference in zip(rank["buffers"], exact.buffers(), strict=True):
            torch.testing.assert_close(buffer.double(), reference.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "side", "size"), [(8, 16, 7), (8, 16, 13), (7, 16, 9), (64, 16, 7), (8, 32, 7)])
def test_on_a_gpu_no_further_from_float64_than_eager(dtype, batch, side, size):
    run = layers(2, channels=256, size=size).cuda()
    fused, exact = pair(run, dtype)
    eager = copy.deepcopy(exact).to(dtype)
    x = torch.randn(batch, 256, side, side, device="cuda").to(dtype)
    upstream = torch.randn_like(x)

    def step(model, x):
        x = x.clone().requires_grad_()
        y = model(x)
        y.backward(upstream.to(y.dtype))
        return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]

    expected = step(exact, x.double())
    for ours, theirs, truth in zip(step(fused, x), step(eager, x), expected, strict=True):
        assert error(ours, truth) <= 1.5 * error(theirs, truth) + 1e-5
