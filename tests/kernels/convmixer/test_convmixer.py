"""The fused ConvMixer layers match the network's own in float64: in the interpreter, and on a GPU with -m gpu."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.overrides import TorchFunctionMode

from mgcc_dist.kernels import FusedConvMixer, FusedConvMixerLayer
from mgcc_dist.kernels.convmixer import op, statistics
from mgcc_dist.kernels.convmixer.spec import unsupported_reason
from mgcc_dist.kernels.targets import INTERPRETED
from mgcc_dist.models.blocks import ConvMixerLayer

# Relative error in the norm. The interpreter truncates bf16 stores, which doubles their error.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CANCELLATION = 20  # factor for gradients of biases and norms, which are sums over the batch that nearly cancel


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def make_layers(count=1, channels=2, size=7):
    """Return layers in training mode whose norms are not the identity."""
    torch.manual_seed(0)
    stack = nn.Sequential(*(ConvMixerLayer(channels, size) for _ in range(count))).train()
    for layer in stack:
        for norm in (layer.depthwise_norm, layer.pointwise_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return stack


def fused_and_reference(stack, dtype):
    """Return the fused stack, with parameters rounded to `dtype`, and the plain stack with equal values in float64."""
    fused = copy.deepcopy(stack)
    for parameter in fused.parameters():
        parameter.data = parameter.data.to(dtype).to(torch.float64 if dtype == torch.float64 else torch.float32)
    reference = copy.deepcopy(fused).double()
    return FusedConvMixer.from_module(fused.double() if dtype == torch.float64 else fused), reference


def check_training_step(fused, reference, x, tolerance):
    """Compare outputs, gradients and running statistics of one training step."""
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = fused(ours), reference(theirs)
    assert relative_error(y.detach(), expected.detach()) < tolerance
    grad_output = torch.randn_like(y)
    y.backward(grad_output)
    expected.backward(grad_output.double())
    assert relative_error(ours.grad, theirs.grad) < 3 * tolerance
    for (name, parameter), expected_parameter in zip(fused.named_parameters(), reference.parameters(), strict=True):
        factor = 3 if parameter.ndim == 4 else CANCELLATION
        assert relative_error(parameter.grad, expected_parameter.grad) < factor * tolerance, name
    for (name, buffer), expected_buffer in zip(fused.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(
            buffer.double(), expected_buffer.double(), rtol=10 * tolerance, atol=tolerance, msg=name
        )


@pytest.mark.interpreted
@pytest.mark.parametrize("size", [9, 13])  # the other tests have 3, 5 and 7
def test_training_step_matches_the_plain_layers_for_large_kernels(size):
    fused, reference = fused_and_reference(make_layers(2, size=size), torch.float32)
    check_training_step(fused, reference, torch.randn(3, 2, 16, 16), TOLERANCE[torch.float32])


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_step_in_half_precision(dtype):
    fused, reference = fused_and_reference(make_layers(), dtype)
    check_training_step(fused, reference, torch.randn(3, 2, 16, 16).to(dtype), TOLERANCE[dtype])


@pytest.mark.interpreted
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (5, 32, 16), (3, 32, 32), (33, 16, 16)])
def test_training_step_of_resident_and_staged_kernels(batch, height, width):
    fused, reference = fused_and_reference(make_layers(2, size=3), torch.float64)
    check_training_step(
        fused, reference, torch.randn(batch, 2, height, width, dtype=torch.float64), TOLERANCE[torch.float64]
    )


@pytest.mark.interpreted
def test_training_step_with_the_gfx942_configuration(monkeypatch):
    """There the backward takes one launch per stage."""
    monkeypatch.setattr(op, "device_target", lambda device: "gfx942")
    fused, reference = fused_and_reference(make_layers(2, size=3), torch.float64)
    check_training_step(fused, reference, torch.randn(3, 2, 32, 32, dtype=torch.float64), TOLERANCE[torch.float64])


@pytest.mark.interpreted
def test_gradcheck():
    fused, _ = fused_and_reference(make_layers(2, size=5), torch.float64)
    x = torch.randn(1, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    shapes = {name: parameter.shape for name, parameter in fused.named_parameters()}
    vector = nn.utils.parameters_to_vector(fused.parameters()).detach().requires_grad_()

    def step(x, vector):  # fast_mode perturbs each input once
        parts = vector.split([shape.numel() for shape in shapes.values()])
        parameters = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(fused, parameters, (x,))

    assert torch.autograd.gradcheck(step, (x, vector), fast_mode=True, nondet_tol=0.0)


@pytest.mark.interpreted
def test_gradients_flow_from_tapped_outputs():
    fused, reference = fused_and_reference(make_layers(3), torch.float64)
    x = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    taps = fused.outputs(ours)
    expected = [theirs]
    for layer in reference:
        expected.append(layer(expected[-1]))
    grad_output = [torch.randn_like(x) for _ in range(2)]
    (gradient,) = torch.autograd.grad((taps[0] * grad_output[0] + taps[2] * grad_output[1]).sum(), ours)
    (expected_gradient,) = torch.autograd.grad(
        (expected[1] * grad_output[0] + expected[3] * grad_output[1]).sum(), theirs
    )
    assert relative_error(gradient, expected_gradient) < 1e-12


@pytest.mark.interpreted
def test_variance_does_not_cancel_when_the_mean_is_large():
    z = 1000 + 1e-2 * torch.randn(2, 10, 16, 16)
    zero, one = torch.zeros(2), torch.ones(2)
    _, stats = op.final_norm(z, zero, one, zero, 1e-5, "")
    values = z.double().transpose(0, 1)
    torch.testing.assert_close(stats[1].double(), values.var(dim=(0, 2, 3), unbiased=False), rtol=1e-3, atol=0)


@pytest.mark.interpreted
def test_kernels_write_every_element(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        fused, reference = fused_and_reference(make_layers(2), torch.float32)
        check_training_step(fused, reference, torch.randn(9, 2, 16, 16), TOLERANCE[torch.float32])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.interpreted
def test_training_step_is_bit_reproducible():
    def run_step():
        fused, _ = fused_and_reference(make_layers(), torch.float32)
        torch.manual_seed(1)
        x = torch.randn(9, 2, 16, 16, requires_grad=True)
        y = fused(x)
        y.square().sum().backward()
        return [y, x.grad, *(parameter.grad for parameter in fused.parameters()), *fused.buffers()]

    assert all(torch.equal(first, second) for first, second in zip(run_step(), run_step(), strict=True))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_evaluation_matches_the_plain_layers(dtype):
    stack = make_layers(3)
    with torch.no_grad():
        stack(torch.randn(4, 2, 16, 16) + 1)  # changes the running statistics
        fused, reference = fused_and_reference(stack.eval(), dtype)
        x = torch.randn(3, 2, 16, 16).to(dtype)
        assert relative_error(fused(x), reference(x.double())) < 2 * TOLERANCE[dtype]


@pytest.mark.interpreted
def test_autocast_computes_in_bf16_and_returns_fp32_gradients():
    fused, reference = fused_and_reference(make_layers(), torch.bfloat16)
    x = torch.randn(2, 2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.detach(), reference(x.double()).detach()) < 2 * TOLERANCE[torch.bfloat16]
    y.sum().backward()
    assert {parameter.grad.dtype for parameter in fused.parameters()} == {torch.float32}


@pytest.mark.interpreted
@pytest.mark.parametrize("with_norm", [False, True])
def test_custom_op_passes_opcheck(with_norm):
    torch.manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, requires_grad=True)

    pre = (make(2), make(2), make(2)) if with_norm else (None, None, None)
    arguments = (make(2, 2, 16, 16), *pre, 1e-5, make(2, 1, 3, 3), make(2), make(2), make(2), 1e-5, "")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.spatial_mix, arguments, test_utils=checks)


@pytest.mark.interpreted
def test_torch_compile_fullgraph_gives_the_same_step():
    fused, reference = fused_and_reference(make_layers(), torch.float32)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    check_training_step(compiled, reference, torch.randn(2, 2, 16, 16), TOLERANCE[torch.float32])


@pytest.mark.interpreted
def test_fused_stack_shares_parameters_and_state_dict_keys():
    stack = make_layers(2)
    fused = FusedConvMixer.from_module(stack)
    assert list(fused.state_dict()) == list(stack.state_dict())
    assert all(mine is theirs for mine, theirs in zip(fused.parameters(), stack.parameters(), strict=True))


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (ConvMixerLayer(2, 7), (1, 2, 15, 16), "heights and widths"),
        (ConvMixerLayer(2, 15), (1, 2, 16, 16), "kernel size"),
        (ConvMixerLayer(2, 7).eval(), (1, 2, 16, 16), "gradients"),
    ],
)
def test_unsupported_input_raises_with_the_reason(layer, shape, reason):
    assert reason in unsupported_reason(layer, torch.randn(shape))
    with pytest.raises(ValueError, match=reason):
        FusedConvMixerLayer.from_module(layer)(torch.randn(shape))


def test_cpu_without_interpreter_is_unsupported():
    if INTERPRETED:
        pytest.skip("this process runs the interpreter")
    reason = unsupported_reason(ConvMixerLayer(2, 7), torch.randn(1, 2, 16, 16))
    assert reason == "the device is cpu, but Triton kernels need a GPU"


def test_merged_rank_statistics_equal_those_of_all_values():
    torch.manual_seed(0)
    parts = [100 + torch.randn(3, count, dtype=torch.float64) for count in (5, 80, 11)]
    counts = torch.tensor([[part.shape[1]] for part in parts], dtype=torch.float64)
    means = torch.stack([part.mean(1) for part in parts])
    variances = torch.stack([part.var(1, unbiased=False) for part in parts])
    merged = statistics.merge_statistics(counts, means, variances)
    values = torch.cat(parts, 1)
    expected = torch.stack([values.mean(1), values.var(1, unbiased=False), values.var(1)])
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


class NoHostValues(TorchFunctionMode):
    """Fails where a value of the host is copied to the device, which synchronises and cannot be captured in a graph."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function.__name__ not in ("new_tensor", "tensor", "as_tensor", "item", "tolist"), function.__name__
        return function(*args, **(kwargs or {}))


def test_statistics_across_ranks_do_not_synchronise_with_the_host(monkeypatch):
    monkeypatch.setattr(statistics, "_resolve", lambda group: None)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_gather", lambda gathered, local, group: [each.copy_(local) for each in gathered])
    monkeypatch.setattr(dist, "all_reduce", lambda sums, group: sums.mul_(2))
    stats, sums = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]), torch.tensor([[6.0, 9.0], [3.0, 12.0]])
    with NoHostValues():
        statistics.gather_statistics(stats, 5, "group")
        statistics.average_sums(sums, 3, "group")
    torch.testing.assert_close(stats, torch.tensor([[1.0, 2.0], [3.0, 4.0], [30 / 9, 40 / 9]]))
    torch.testing.assert_close(sums, torch.tensor([[2.0, 3.0], [1.0, 4.0]]))


def step_with_sync_batch_norm(rank, inputs_path):
    """Train one step on this rank's part of a batch, and save what it computed."""
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    dist.init_process_group("gloo", init_method=f"file://{inputs_path}.store", rank=rank, world_size=2)
    inputs = torch.load(inputs_path, weights_only=True)
    stack = nn.Sequential(*(ConvMixerLayer(2, 5) for _ in range(2))).double().train()
    stack.load_state_dict(inputs["state"])
    fused = FusedConvMixer.from_module(nn.SyncBatchNorm.convert_sync_batchnorm(stack))
    part = slice(0, 2) if rank == 0 else slice(2, 5)  # unequal sizes on purpose
    x = inputs["x"][part].requires_grad_()
    y = fused(x)
    y.backward(inputs["grad_output"][part])
    gradients = [parameter.grad for parameter in fused.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    result = {"y": y.detach(), "dx": x.grad, "gradients": gradients, "buffers": list(fused.buffers())}
    torch.save(result, f"{inputs_path}.{rank}")
    dist.destroy_process_group()


@pytest.mark.interpreted
@pytest.mark.multiprocess
def test_sync_batch_norm_on_two_ranks_equals_one_rank_with_the_full_batch(tmp_path):
    reference = make_layers(2, size=5).double()
    x = torch.randn(5, 2, 16, 16, dtype=torch.float64)
    grad_output = torch.randn_like(x)
    torch.save({"state": reference.state_dict(), "x": x, "grad_output": grad_output}, tmp_path / "inputs")
    mp.start_processes(step_with_sync_batch_norm, (tmp_path / "inputs",), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"inputs.{rank}", weights_only=True) for rank in (0, 1)]
    x.requires_grad_()
    y = reference(x)
    y.backward(grad_output)
    assert relative_error(torch.cat([rank["y"] for rank in ranks]), y.detach()) < 1e-12
    assert relative_error(torch.cat([rank["dx"] for rank in ranks]), x.grad) < 1e-12
    for gradient, parameter in zip(ranks[0]["gradients"], reference.parameters(), strict=True):
        assert relative_error(gradient, parameter.grad) < 1e-11
    for rank in ranks:
        for buffer, expected_buffer in zip(rank["buffers"], reference.buffers(), strict=True):
            torch.testing.assert_close(buffer.double(), expected_buffer.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "side", "size"), [(8, 16, 7), (8, 16, 13), (7, 16, 9), (64, 16, 7), (8, 32, 7)])
def test_gpu_error_is_close_to_that_of_eager(dtype, batch, side, size):
    stack = make_layers(2, channels=256, size=size).cuda()
    fused, reference = fused_and_reference(stack, dtype)
    eager = copy.deepcopy(reference).to(dtype)
    x = torch.randn(batch, 256, side, side, device="cuda").to(dtype)
    grad_output = torch.randn_like(x)

    def step(model, x):
        x = x.clone().requires_grad_()
        y = model(x)
        y.backward(grad_output.to(y.dtype))
        return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]

    expected = step(reference, x.double())
    for ours, theirs, truth in zip(step(fused, x), step(eager, x), expected, strict=True):
        assert relative_error(ours, truth) <= 1.5 * relative_error(theirs, truth) + 1e-5
