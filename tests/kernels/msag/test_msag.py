"""The fused gate matches MSAG in float64: outputs, gradients, running statistics; in Triton's interpreter."""

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton")

from mgcc_dist.kernels import FusedMSAG
from mgcc_dist.kernels.msag import op
from mgcc_dist.kernels.msag.spec import PARTS, unsupported_reason
from mgcc_dist.kernels.msag.tiles import EVALUATION_IMPLEMENTATIONS
from mgcc_dist.models.blocks import MSAG

interpreted = pytest.mark.interpreted

# Relative error in the norm. The interpreter truncates to bfloat16, so its errors are twice those of a GPU.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# The gradient of ReLU jumps at 0. A rounded u near 0 can change sides, which is visible with few hundred pixels.
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 3e-2, torch.bfloat16: 6e-2}


def gate_and_reference(channels, dtype, seed=0):
    """Return a gate whose norms are not the identity, with parameters of `dtype`, and its copy in float64."""
    torch.manual_seed(seed)
    gate = MSAG(channels)
    for norm in (gate.pointwise_norm, gate.ordinary_norm, gate.dilated_norm, gate.vote_norm):
        torch.nn.init.normal_(norm.weight, mean=1, std=0.3)
        torch.nn.init.normal_(norm.bias, std=0.3)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    gate = gate.to(dtype)
    return gate, copy.deepcopy(gate).double()


def random_input(shape, dtype, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@interpreted
@pytest.mark.parametrize("implementation", EVALUATION_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 16, 9, 17), (2, 32, 5, 3)], ids=str)
@torch.no_grad()
def test_evaluation_matches_the_plain_module(implementation, dtype, shape):
    gate, reference = gate_and_reference(shape[1], dtype)
    x = random_input(shape, dtype)
    ours = FusedMSAG.from_module(gate.eval(), implementation)(x)
    assert ours.dtype == dtype
    assert relative_error(ours, reference.eval()(x.double())) < TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *((dtype, (2, 16, 7, 19)) for dtype in TOLERANCE),
        (torch.float32, (1, 48, 2, 5)),  # branches of three blocks each
        (torch.float32, (2, 16, 1, 1)),
    ],
    ids=str,
)
def test_training_step_matches_the_plain_module(dtype, shape):
    gate, reference = gate_and_reference(shape[1], dtype)
    fused = FusedMSAG.from_module(gate)
    ours, theirs = (
        random_input(shape, dtype).requires_grad_(),
        random_input(shape, dtype).double().clone().requires_grad_(),
    )
    grad_output = random_input(shape, dtype, seed=2)
    y, expected = fused(ours), reference(theirs)
    y.backward(grad_output)
    expected.backward(grad_output.double())
    tolerance = GRADIENT_TOLERANCE[dtype]
    if shape[0] * shape[2] * shape[3] == 2:
        tolerance = 1e-2  # two values per channel are ±1 after a norm, so their gradients cancel except for epsilon
    assert relative_error(y, expected) < TOLERANCE[dtype]
    assert relative_error(ours.grad, theirs.grad) < tolerance
    parameters = dict(reference.named_parameters())
    for name, parameter in fused.named_parameters():
        if name in {f"{part}.bias" for part in PARTS}:  # a norm removes a bias, so its gradient is zero
            assert not parameter.grad.any()
            torch.testing.assert_close(parameters[name].grad, torch.zeros_like(parameters[name]), rtol=0, atol=1e-11)
        else:
            assert relative_error(parameter.grad, parameters[name].grad) < tolerance, name
    buffers = dict(reference.named_buffers())
    for name, buffer in fused.named_buffers():
        assert relative_error(buffer, buffers[name]) < TOLERANCE[dtype], name


@interpreted
def test_gradcheck():
    """Along a random direction of all inputs at once, because each input needs forward passes of its own."""
    gate, _ = gate_and_reference(16, torch.float64)
    weights, vote = FusedMSAG.from_module(gate).cast_weights(torch.float64)
    norms = [getattr(gate, f"{part}_norm") for part in PARTS]
    affine = [torch.cat([getattr(norm, name) for norm in norms]) for name in ("weight", "bias")]
    inputs = [random_input((2, 16, 3, 4), torch.float64), *weights, vote, *affine]
    biases = torch.zeros(64, dtype=torch.float64)

    def y(values):
        parts = values.split([each.numel() for each in inputs])
        x, *weights, vote, gammas, betas = (part.view(each.shape) for part, each in zip(parts, inputs, strict=True))
        layout = torch.channels_last
        weights = [weight.contiguous(memory_format=layout) for weight in weights]
        return op.msag_train(x.contiguous(memory_format=layout), weights, vote, biases, gammas, betas, 1e-5)[0]

    values = torch.cat([each.detach().flatten() for each in inputs]).requires_grad_()
    assert torch.autograd.gradcheck(y, values, fast_mode=True)


@interpreted
def test_variance_does_not_cancel_when_the_mean_is_large():
    """E[u²] - E[u]² in float32 would have no correct digit here."""
    value = 1000 + 0.01 * random_input((300, 16), torch.float64)
    partial, counts = torch.empty(3, 2, 16), torch.tensor([128.0, 128.0, 44.0])
    for tile, rows in zip(partial, value.split(128), strict=True):
        tile[0], tile[1] = rows.mean(0), (rows - rows.mean(0)).square().sum(0)
    norm = op.launch_merge_moments(partial, counts, torch.ones(16), torch.zeros(16), 300, eps=0.0)
    torch.testing.assert_close(norm[4].double(), value.var(0, unbiased=False), rtol=2e-2, atol=0)
    gate, reference = gate_and_reference(16, torch.float32)
    x = random_input((2, 16, 6, 9), torch.float32) * 0.01 + 10
    y, expected = FusedMSAG.from_module(gate)(x), reference(x.double())
    eager = copy.deepcopy(reference).float()(x)
    assert relative_error(y, expected) < max(2e-6, 1.5 * relative_error(eager, expected))


class NaNInNewTensors(TorchFunctionMode):
    """Fills new tensors with NaN, so that elements a kernel does not write are visible."""

    poisoned = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function.__name__ in ("empty", "empty_like", "new_empty") and made.is_floating_point():
            self.poisoned += 1
            made.fill_(float("nan"))
        return made


@interpreted
def test_kernels_write_every_element_and_are_bit_reproducible():
    gate, _ = gate_and_reference(16, torch.float32)
    tensors = []
    for mode in (torch.no_grad(), NaNInNewTensors()):
        with mode:
            x = random_input((2, 16, 9, 18), torch.float32).contiguous(memory_format=torch.channels_last)
            fused = FusedMSAG.from_module(copy.deepcopy(gate))
            weights, vote = fused.cast_weights(torch.float32)
            vectors = [torch.linspace(0.5, 1.5, 64), torch.linspace(0.5, 1.5, 64), torch.linspace(-1, 1, 64)]
            weights = [weight.detach() for weight in weights]
            y, *kept = op.train_forward(x, weights, vote.detach(), *vectors, 1e-5)
            gradients = op.train_backward(torch.ones_like(x), x, weights, vote.detach(), *kept)
            dx, dweights, *others = gradients
            tensors.append([y, *kept, dx, *dweights, *others])
    assert mode.poisoned >= 14  # u, v, y, du, dv, dx, two norms, and the partial sums
    for first, second in zip(*tensors, strict=True):
        assert torch.isfinite(second).all()
        assert torch.equal(first, second)


@interpreted
def test_backward_reads_the_slice_that_cat_returns_without_copying_it(monkeypatch):
    strides = []
    train_backward = op.train_backward

    def record(dy, *others):
        strides.append(dy.stride())
        return train_backward(dy, *others)

    monkeypatch.setattr(op, "train_backward", record)
    gate, reference = gate_and_reference(16, torch.float32)
    x = random_input((2, 16, 5, 3), torch.float32).to(memory_format=torch.channels_last)
    grad_output = random_input((2, 48, 5, 3), torch.float32, seed=2).to(memory_format=torch.channels_last)

    def gradients(module, x, dtype):
        x = x.detach().to(dtype).requires_grad_()
        joined = torch.cat((x, module(x), x), dim=1)
        return torch.autograd.grad(joined, [x, module.vote.weight, module.ordinary.weight], grad_output.to(dtype))

    ours = gradients(FusedMSAG.from_module(gate), x, torch.float32)
    for fused, expected in zip(ours, gradients(reference, x, torch.float64), strict=True):
        assert relative_error(fused, expected) < GRADIENT_TOLERANCE[torch.float32]
    assert strides == [(5 * 3 * 48, 1, 3 * 48, 48)]


@pytest.mark.parametrize(
    ("strides", "stride"),
    [
        ((60, 1, 12, 4), 4),
        ((150, 1, 30, 10), 10),
        ((60, 15, 3, 1), None),
        ((75, 1, 15, 4), None),
        ((60, 1, 13, 4), None),
    ],
)
def test_pixel_stride_is_that_of_evenly_spaced_pixels(strides, stride):
    assert op.pixel_stride(torch.empty_strided((2, 4, 5, 3), strides)) == stride
    assert op.pixel_stride(torch.empty(2, 4, 1, 1)) == 4


@interpreted
@torch.no_grad()
def test_cached_weights_follow_changed_parameters_and_statistics():
    gate, _ = gate_and_reference(16, torch.float32)
    fused = FusedMSAG.from_module(gate.eval())
    x = random_input((1, 16, 4, 4), torch.float32)
    for change in (
        lambda: gate.vote.weight.mul_(2),
        lambda: gate.dilated_norm.running_var.fill_(3),
        lambda: gate.load_state_dict(gate_and_reference(16, torch.float32, seed=5)[0].state_dict()),
    ):
        before = fused(x)
        change()
        after = fused(x)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, gate(x), rtol=1e-5, atol=1e-6)


@interpreted
def test_autocast_computes_in_bf16_and_returns_fp32_gradients():
    gate, reference = gate_and_reference(16, torch.float32)
    fused = FusedMSAG.from_module(gate)
    x = random_input((2, 16, 6, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert 1e-5 < relative_error(y, reference(x.double())) < 8e-3
    assert {parameter.grad.dtype for parameter in fused.parameters()} == {torch.float32}


@interpreted
def test_custom_ops_pass_opcheck():
    gate, _ = gate_and_reference(16, torch.float32)
    fused = FusedMSAG.from_module(gate)
    weights, vote = fused.cast_weights(torch.float32)
    weights, vote = [weight.detach().requires_grad_() for weight in weights], vote.detach().requires_grad_()
    x = random_input((2, 16, 3, 5), torch.float32).to(memory_format=torch.channels_last).requires_grad_()
    vectors = [torch.rand(64, requires_grad=True) for _ in range(3)]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.msag_train, (x, weights, vote, *vectors, 1e-5), test_utils=checks)
    norm = torch.rand(3, 48), torch.rand(3, 16)
    plain = x.detach(), [weight.detach() for weight in weights], vote.detach()
    torch.library.opcheck(op.msag_evaluate, (*plain, *norm, "single_kernel"), test_utils=checks)


@interpreted
def test_torch_compile_fullgraph_gives_the_same_step():
    gate, _ = gate_and_reference(16, torch.float32)
    fused, compiled = FusedMSAG.from_module(copy.deepcopy(gate)), FusedMSAG.from_module(gate)
    x = random_input((2, 16, 3, 5), torch.float32)
    fused(x).square().sum().backward()
    torch.compile(compiled, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(compiled.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fused_gate_shares_parameters_and_state_dict_keys():
    gate = MSAG(16)
    fused = FusedMSAG.from_module(gate)
    assert list(fused.state_dict()) == list(gate.state_dict())
    assert all(a is b for a, b in zip(fused.parameters(), gate.parameters(), strict=True))


@interpreted
@pytest.mark.parametrize(
    ("channels", "shape", "change", "reason"),
    [
        (24, (1, 24, 4, 4), None, "24 channels"),
        (16, (1, 16, 1, 1), None, "single pixel"),
        (16, (16, 4, 4), None, "3 dimensions"),
        (16, (1, 16, 4, 4), lambda gate: gate.eval(), "gradients are enabled"),
        (16, (1, 16, 4, 4), lambda gate: gate.vote_norm.eval(), "differ"),
        (16, (1, 16, 4, 4), lambda gate: setattr(gate, "vote_norm", torch.nn.SyncBatchNorm(16)), "SyncBatchNorm"),
        (16, (1, 16, 4, 4), None, None),
    ],
)
def test_unsupported_reasons(channels, shape, change, reason):
    gate = MSAG(channels)
    if change is not None:
        change(gate)
    found = unsupported_reason(gate, torch.zeros(shape))
    assert found is None if reason is None else reason in found


def test_float32_is_unsupported_on_a_gpu():
    gate = MSAG(16)
    with FakeTensorMode():
        single, half = (torch.zeros(1, 16, 4, 4, dtype=dtype, device="cuda") for dtype in (torch.float32, torch.half))
        assert "float32" in unsupported_reason(gate, single)
        assert "weights are on cpu" in unsupported_reason(gate, half)


def test_cpu_without_interpreter_is_unsupported():
    assert unsupported_reason(MSAG(16), torch.zeros(1, 16, 4, 4)) == "the device is cpu, but Triton kernels need a GPU"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "size"), [(64, 256), (128, 128), (256, 64), (512, 32), (64, 37)])
def test_gpu_error_is_close_to_that_of_eager(channels, size, dtype):
    gate, reference = gate_and_reference(channels, dtype)
    gate, reference = gate.cuda(), reference.cuda()
    x = random_input((2, channels, size, size), dtype).cuda().contiguous(memory_format=torch.channels_last)
    grad_output = random_input(x.shape, dtype, seed=2).cuda()

    def step(module, x, grad_output):
        x = x.detach().clone().requires_grad_()
        y = module(x)
        gradients = torch.autograd.grad(y, [x, *(p for n, p in module.named_parameters() if p.dim() > 1)], grad_output)
        return [y, *gradients]

    exact = step(copy.deepcopy(reference), x.double(), grad_output.double())
    eager = step(copy.deepcopy(gate), x, grad_output)
    ours = step(FusedMSAG.from_module(copy.deepcopy(gate)), x, grad_output)
    for fused, plain, reference_output in zip(ours, eager, exact, strict=True):
        assert relative_error(fused, reference_output) <= 1.5 * relative_error(plain, reference_output)
    with torch.no_grad():
        reference_output, plain = reference.eval()(x.double()), gate.eval()(x)
        for implementation in EVALUATION_IMPLEMENTATIONS:
            if implementation != "single_kernel" or channels <= 128:
                assert relative_error(
                    FusedMSAG.from_module(gate, implementation)(x), reference_output
                ) <= 1.5 * relative_error(plain, reference_output), implementation
