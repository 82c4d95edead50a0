"""A fused network computes what the plain one does, and says what it does not fuse."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from mgcc_dist.kernels import convmixer, measured
from mgcc_dist.kernels.bench.counts import saved_bytes
from mgcc_dist.kernels.bench.workloads import LAYOUTS
from mgcc_dist.kernels.fuse import Choice, fuse
from mgcc_dist.kernels.measured import CPU, TABLE, read_table
from mgcc_dist.methods.losses import consistency_loss, supervised_loss
from mgcc_dist.models.blocks import MSAG, ConvMixer, UpConv
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.registry import build_network

pytestmark = pytest.mark.filterwarnings("ignore:kernels (auto|triton)")


def network(widths=(4, 8), size=16, seed=0):
    torch.manual_seed(seed)
    config = NetworkConfig(name="mgcc", in_channels=1, widths=widths, taps=(1, 2), gates=(True,) * 3, kernel_size=3)
    model = build_network(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model, torch.randn(2, 1, size, size)


def step(model, images):
    """Loss and gradients, by name, of one MGCC step on a labeled and an unlabeled image."""
    main, auxiliary = model.train()(images)
    masks = (images[:1] > 0).to(images)
    supervised = sum(supervised_loss(y[:1], masks) for y in (main, *auxiliary))
    loss = supervised + consistency_loss(main[1:], [y[1:] for y in auxiliary], False)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def compare_step(model, images, kernels, tolerance):
    """Loss, gradients and running statistics of a fused step against the plain one in float64."""
    fused, exact = fuse(copy.deepcopy(model), kernels), copy.deepcopy(model).double()
    right, right_gradients = step(exact, images.double())
    loss, gradients = step(fused, images)
    assert abs(loss.double() - right) <= tolerance * abs(right)
    largest = max(gradient.norm() for gradient in right_gradients.values())
    for name, gradient in gradients.items():
        # A convolution before a BN in training has a bias whose gradient is zero, and rounding alone.
        error = (gradient.double() - right_gradients[name]).norm()
        assert error <= tolerance * (right_gradients[name].norm() + 1e-2 * largest), name
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value.double(), exact.state_dict()[name].double(), rtol=tolerance, atol=tolerance)


@pytest.fixture
def no_perturbation(monkeypatch):
    """Random draws differ between precisions; the decoders see the features as they are."""
    monkeypatch.setattr("mgcc_dist.models.mgcc.perturbed", lambda features, perturb, perturb_skips: list(features))


def test_training_step_by_torch_forms_is_the_plain_one_in_float64(no_perturbation):
    model, images = network()
    compare_step(model, images, "torch", 2e-5)


@pytest.mark.interpreted
def test_training_step_by_triton_forms_is_the_plain_one_in_float64(no_perturbation):
    # Planes of 16, as the mixer's kernels need; seed 0 has a ReLU so near its kink that plain float32 is off by 1e-3.
    model, images = network(widths=(16, 16), size=32, seed=1)
    fused = fuse(copy.deepcopy(model), "triton")
    x = torch.randn(2, 16, 16, 16)
    formed = {c.operation: c.form_for(x) for c in fused.train().modules() if isinstance(c, Choice)}
    assert formed == {"msag": "triton", "mixer": "triton", "upconv": "torch"}
    compare_step(model, images, "triton", 2e-5)


@pytest.mark.interpreted
def test_the_mixer_runs_as_one_and_is_tapped_where_the_plain_one_is(no_perturbation, monkeypatch):
    runs = []
    train = convmixer._train
    monkeypatch.setattr(convmixer, "_train", lambda layers, x: runs.append(len(layers)) or train(layers, x))
    torch.manual_seed(2)
    plain = ConvMixer(2, 3, 3)
    fused = fuse(copy.deepcopy(plain), "triton")
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 2, 16, 16)
    for ours, right in zip(fused.outputs(x), plain.double().outputs(x.double()), strict=True):
        assert (ours.double() - right).norm() <= 2e-6 * right.norm()
    assert runs == [3]
    fused(x)
    assert runs == [3, 3]


@pytest.mark.interpreted
def test_torch_compile_traces_triton_forms_and_their_gradients_into_one_graph():
    torch.manual_seed(0)
    plain = nn.Sequential(ConvMixer(16, 3, 1), MSAG(16), UpConv(16, 16))
    fused = fuse(copy.deepcopy(plain), "triton")
    fused.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 16, 16, 16)
    for model in (plain, fused):
        model(x).square().sum().backward()
    for ours, right in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, right.grad, rtol=1e-3, atol=1e-2)


def test_fused_and_plain_load_each_other_s_weights():
    plain, images = network()
    fused = fuse(network(seed=1)[0], "torch")
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    fused.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)
    plain.load_state_dict(fused.state_dict())


@torch.no_grad()
def test_a_copy_has_weights_of_its_own():
    fused = fuse(network()[0], "torch").eval()
    _, images = network()
    twin = copy.deepcopy(fused)
    before = fused(images)
    for parameter in twin.parameters():
        parameter.zero_()
    torch.testing.assert_close(fused(images), before, rtol=0, atol=0)
    assert (twin(images) == 0).all()
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in fused.parameters()}


def test_a_part_that_is_replaced_is_so_in_every_form():
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(UpConv(2, 2), "torch"))
    assert all(isinstance(form.norm, nn.SyncBatchNorm) for form in fused.forms.values())


def test_mode_reaches_every_form():
    fused = fuse(nn.Sequential(UpConv(2, 2)), "torch").eval()
    assert not any(form.training for form in fused[0].forms.values())
    assert all(form.training for form in fused.train()[0].forms.values())


@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_sees_one_graph(training, no_perturbation):
    model, images = network()
    fused = fuse(model, "torch").train(training)
    with torch.set_grad_enabled(training):
        compiled = torch.compile(copy.deepcopy(fused), backend="eager", fullgraph=True)(images)
        torch.testing.assert_close(compiled, fused(images))


@torch.no_grad()
def test_triton_without_a_gpu_says_so_once_and_computes_in_pytorch():
    model, images = network()
    fused = fuse(copy.deepcopy(model), "triton").eval()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.testing.assert_close(fused(images), model.eval()(images), rtol=1e-4, atol=1e-5)
        fused(images)
    text = "kernels triton: Triton's kernels need a GPU and the tensors are on cpu, so PyTorch runs"
    assert [str(warning.message) for warning in said] == [text]


@pytest.mark.interpreted
@torch.no_grad()
def test_what_a_triton_form_refuses_is_said_once_with_the_reason():
    model, images = network(widths=(16, 16), size=16)  # the mixer's planes are 8x8
    fused = fuse(copy.deepcopy(model), "triton").eval()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.testing.assert_close(fused(images), model.eval()(images), rtol=1e-4, atol=1e-5)
        fused(images)
    text = "kernels triton: mixer: the planes are (8, 8); the kernels are for sides of (16, 32), so PyTorch runs"
    assert [str(warning.message) for warning in said] == [text]


def table(path, **changes):
    row = {"device": CPU, "op": "upconv", "form": "torch", "mode": "evaluation", "dtype": "float32"}
    row |= {"layout": "contiguous", "batch": 1}
    path.write_text(json.dumps({"rows": [row | {"shape": [2, 4, 4, 3], "ratio": 1.5} | changes]}))
    return path


@torch.no_grad()
def test_auto_takes_what_was_measured_to_be_as_fast_and_nothing_else(tmp_path):
    x, file = torch.randn(1, 2, 4, 4), tmp_path / "measured.json"

    def form(x=x, **changes):
        return fuse(UpConv(2, 3), "auto", table(file, **changes)).eval().form_for(x)

    assert form() == "torch"
    assert form(ratio=1.0) == "torch"
    assert form(ratio=0.99) == "plain"
    assert form(dtype="bfloat16") == "plain"
    assert form(mode="training") == "plain"
    assert form(device="another") == "plain"
    assert form(x=torch.randn(1, 2, 4, 5)) == "plain"
    assert form(x=x.to(memory_format=torch.channels_last)) == "plain"
    assert form(x=x.to(memory_format=torch.channels_last), layout="channels_last") == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert form() == "plain"
        assert form(dtype="bfloat16") == "torch"
    with torch.enable_grad():
        assert form() == "plain"


def test_auto_takes_on_a_cpu_what_the_package_s_own_table_shows_and_nothing_else(monkeypatch):
    device = "cpu x86_64 AVX512"
    table = read_table(TABLE)[device]
    monkeypatch.setattr("mgcc_dist.kernels.fuse.device_name", lambda _: device)
    taken = set()
    for (op, form, mode, dtype, layout, shape), ratio in table.items():
        channels, height, width, out = shape
        choice = fuse(UpConv(channels, out)).train(mode == "training")
        x = torch.empty(1, channels, height, width, memory_format=LAYOUTS[layout])
        cast = torch.autocast("cpu", getattr(torch, dtype), dtype != "float32")
        with torch.set_grad_enabled(choice.training), cast:
            assert choice.form_for(x) == (form if ratio >= 1 else "plain")
            assert choice.form_for(x[:, :, :, 1:]) == "plain"
        taken |= {(op, form, mode)} if ratio >= 1 else set()
    assert taken == {("upconv", "torch", "training"), ("upconv", "torch", "evaluation")}


@torch.no_grad()
def test_torch_compile_sees_one_graph_where_the_table_decides(tmp_path):
    model = fuse(nn.Sequential(UpConv(2, 3)), "auto", table(tmp_path / "measured.json")).eval()
    x = torch.randn(1, 2, 4, 4)
    assert model[0].form_for(x) == "torch"
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@torch.no_grad()
def test_gpu_name_lookup_does_not_break_the_compiled_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", torch._dynamo.disable(lambda device: "H100"))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("mgcc_dist.kernels.fuse.device_name", lambda device: measured.device_name(gpu))
    model = fuse(nn.Sequential(UpConv(2, 2), UpConv(2, 2)), "auto", table(tmp_path / "t.json", device="H100")).eval()
    assert torch._dynamo.explain(model)(torch.randn(1, 2, 4, 4)).graph_count == 1


@torch.no_grad()
def test_auto_says_once_that_nothing_was_measured(tmp_path):
    model = fuse(nn.Sequential(UpConv(2, 2), UpConv(2, 2)), "auto", table(tmp_path / "t.json", device="another")).eval()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(torch.randn(1, 2, 4, 4))
    assert ["nothing was measured on" in str(warning.message) for warning in said] == [True]


def test_fusing_again_changes_the_choice_not_the_weights():
    model, _ = network()
    keys = list(model.state_dict())
    fused = fuse(fuse(model, "auto"), "torch")
    assert list(fused.state_dict()) == keys
    assert {choice.policy.kernels for choice in fused.modules() if type(choice) is Choice} == {"torch"}


def kept_by_a_step(model, images):
    return saved_bytes(lambda: model.train()(images), model.parameters())


def test_phase_wise_up_convolution_keeps_less_for_backward(no_perturbation):
    model, images = network(widths=(8, 16), size=64)
    assert kept_by_a_step(fuse(copy.deepcopy(model), "torch"), images) < kept_by_a_step(model, images)


@pytest.mark.interpreted
def test_triton_forms_keep_less_for_backward(no_perturbation):
    model, images = network(widths=(16, 16), size=32)
    assert kept_by_a_step(fuse(copy.deepcopy(model), "triton"), images) < kept_by_a_step(model, images)
