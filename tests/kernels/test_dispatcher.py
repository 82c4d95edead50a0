"""A fused network computes the same as the plain one, and warns about what it does not fuse."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from benchmarks.step import StepConfig, StepSettings, package_step
from mgcc_dist.bench.counts import saved_bytes
from mgcc_dist.kernels import TABLE_PATH, measured
from mgcc_dist.kernels.dispatcher import KernelDispatcher, fuse
from mgcc_dist.kernels.measured import CPU, read_table
from mgcc_dist.kernels.operation import LAYOUTS
from mgcc_dist.methods.losses import consistency_loss, supervised_loss
from mgcc_dist.models.blocks import MSAG, ConvMixer, UpConv
from mgcc_dist.models.config import MGCCConfig
from mgcc_dist.models.network import build_network

pytestmark = pytest.mark.filterwarnings("ignore:kernels=(auto|triton)")


def network(widths=(4, 8), size=16, seed=0, auxiliary=2):
    torch.manual_seed(seed)
    taps = tuple(range(1, auxiliary + 1))
    config = MGCCConfig(in_channels=1, widths=widths, taps=taps, gates=(True,) * (auxiliary + 1), kernel_size=3)
    model = build_network(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model, torch.randn(2, 1, size, size)


def step(model, images):
    """Return the loss and the gradients, by name, of one MGCC step on a labeled and an unlabeled image."""
    main, auxiliary = model.train()(images)
    masks = (images[:1] > 0).to(images)
    supervised = sum(supervised_loss(y[:1], masks) for y in (main, *auxiliary))
    loss = supervised + consistency_loss(main[1:], [y[1:] for y in auxiliary], False)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def check_step(model, images, kernels, tolerance):
    """Compare loss, gradients and running statistics of a fused step with the plain one in float64."""
    fused, reference = fuse(copy.deepcopy(model), kernels), copy.deepcopy(model).double()
    expected, expected_gradients = step(reference, images.double())
    loss, gradients = step(fused, images)
    assert abs(loss.double() - expected) <= tolerance * abs(expected)
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        # The gradient of a bias before a BN in training is zero plus rounding.
        difference = (gradient.double() - expected_gradients[name]).norm()
        assert difference <= tolerance * (expected_gradients[name].norm() + 1e-2 * largest), name
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(
            value.double(), reference.state_dict()[name].double(), rtol=tolerance, atol=tolerance
        )


@pytest.fixture
def without_perturbation(monkeypatch):
    """Leave the decoders' inputs unchanged, because random draws differ between precisions."""
    monkeypatch.setattr("mgcc_dist.models.mgcc.perturbed", lambda features, perturb, perturb_skips: list(features))


def test_torch_implementations_train_like_the_plain_network_in_float64(without_perturbation):
    model, images = network()
    check_step(model, images, "torch", 2e-5)


@pytest.mark.interpreted
def test_triton_implementations_train_like_the_plain_network_in_float64(without_perturbation):
    # The mixer's kernels need 16x16 maps. With seed 0 a ReLU input is so close to 0 that plain float32 is off by 1e-3.
    model, images = network(widths=(16, 16), size=32, seed=1, auxiliary=1)
    fused = fuse(copy.deepcopy(model), "triton")
    x = torch.randn(2, 16, 16, 16)
    selected = {d.operation: d.select(x) for d in fused.train().modules() if isinstance(d, KernelDispatcher)}
    assert selected == {"msag": "triton", "mixer": "triton", "upconv": "torch"}
    check_step(model, images, "triton", 2e-5)


@pytest.mark.interpreted
def test_mixer_runs_as_one_stack_and_returns_every_layer_output(without_perturbation, monkeypatch):
    from mgcc_dist.kernels.convmixer import module  # imports Triton

    stack_sizes = []
    forward = module._forward_training

    def record(layers, x):
        stack_sizes.append(len(layers))
        return forward(layers, x)

    monkeypatch.setattr(module, "_forward_training", record)
    torch.manual_seed(2)
    plain = ConvMixer(2, 3, 3)
    fused = fuse(copy.deepcopy(plain), "triton")
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 2, 16, 16)
    for ours, expected in zip(fused.outputs(x), plain.double().outputs(x.double()), strict=True):
        assert (ours.double() - expected).norm() <= 2e-6 * expected.norm()
    assert stack_sizes == [3]
    fused(x)
    assert stack_sizes == [3, 3]


@pytest.mark.interpreted
def test_torch_compile_traces_triton_implementations_and_gradients_into_one_graph():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer, self.gate, self.up = ConvMixer(2, 3, 1), MSAG(16), UpConv(16, 4)

        def forward(self, x):
            return self.mixer(x[:, :2]).square().sum() + self.up(self.gate(x[:, :, :3, :4])).square().sum()

    torch.manual_seed(0)
    plain = Network()
    fused = fuse(copy.deepcopy(plain), "triton")
    fused.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 16, 16, 16)
    for model in (plain, fused):
        model(x).backward()
    for ours, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.interpreted
def test_fused_kernels_run_triton_in_the_benchmarked_training_step():
    config = StepConfig(8, (16, 16), batch=1, steps=3, device="cpu", threads=1)
    step, facts = package_step(StepSettings(fused_kernels=True), config)
    assert facts["implementations"]["triton"] == 4  # the gate of each decoder
    assert 0 < step(0).item() < 10


def test_unknown_kernels_are_rejected():
    with pytest.raises(ValueError, match=r"fuse: unknown kernels 'cuda'\. Choose one of auto, torch, triton"):
        fuse(network()[0], "cuda")


def test_fused_and_plain_models_load_the_same_state_dict():
    plain, images = network()
    fused = fuse(network(seed=1)[0], "torch")
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    fused.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)
    plain.load_state_dict(fused.state_dict())


@torch.no_grad()
def test_deepcopy_does_not_share_weights():
    fused = fuse(network()[0], "torch").eval()
    _, images = network()
    twin = copy.deepcopy(fused)
    before = fused(images)
    for parameter in twin.parameters():
        parameter.zero_()
    torch.testing.assert_close(fused(images), before, rtol=0, atol=0)
    assert (twin(images) == 0).all()
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in fused.parameters()}


def test_replacing_a_submodule_reaches_every_implementation():
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(UpConv(2, 2), "torch"))
    assert all(isinstance(module.norm, nn.SyncBatchNorm) for module in fused.implementations.values())


def test_train_and_eval_reach_every_implementation():
    fused = fuse(nn.Sequential(UpConv(2, 2)), "torch").eval()
    assert not any(module.training for module in fused[0].implementations.values())
    assert all(module.training for module in fused.train()[0].implementations.values())


@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_traces_one_graph(training, without_perturbation):
    model, images = network(auxiliary=1)
    fused = fuse(model, "torch").train(training)
    with torch.set_grad_enabled(training):
        compiled = torch.compile(copy.deepcopy(fused), backend="eager", fullgraph=True)(images)
        torch.testing.assert_close(compiled, fused(images))


@torch.no_grad()
def test_triton_without_a_gpu_warns_once_and_uses_pytorch():
    model, images = network()
    fused = fuse(copy.deepcopy(model), "triton").eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(fused(images), model.eval()(images), rtol=1e-4, atol=1e-5)
        fused(images)
    text = "kernels=triton: Triton kernels need a GPU and the tensors are on cpu; using PyTorch"
    assert [str(warning.message) for warning in caught] == [text]


@pytest.mark.interpreted
@torch.no_grad()
def test_unsupported_input_warns_once_with_the_reason():
    model, images = network(widths=(16, 16), size=16)  # the mixer's input is 8x8
    fused = fuse(copy.deepcopy(model), "triton").eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(fused(images), model.eval()(images), rtol=1e-4, atol=1e-5)
        fused(images)
    text = (
        "kernels=triton: mixer: the input is (8, 8), but the kernels support heights and widths (16, 32); using PyTorch"
    )
    assert [str(warning.message) for warning in caught] == [text]


def table(path, **changes):
    row = {"device": CPU, "op": "upconv", "implementation": "torch", "mode": "evaluation", "dtype": "float32"}
    row |= {"layout": "contiguous", "batch": 1}
    path.write_text(json.dumps({"rows": [row | {"shape": [2, 4, 4, 3], "speedup": 1.5} | changes]}))
    return path


@torch.no_grad()
def test_auto_uses_only_implementations_measured_as_at_least_as_fast(tmp_path):
    x, file = torch.randn(1, 2, 4, 4), tmp_path / "measured.json"

    def select(x=x, **changes):
        return fuse(UpConv(2, 3), "auto", table(file, **changes)).eval().select(x)

    assert select() == "torch"
    assert select(speedup=1.0) == "torch"
    assert select(speedup=0.99) == "plain"
    assert select(dtype="bfloat16") == "plain"
    assert select(mode="training") == "plain"
    assert select(device="another") == "plain"
    assert select(x=torch.randn(1, 2, 4, 5)) == "plain"
    assert select(x=x.to(memory_format=torch.channels_last)) == "plain"
    assert select(x=x.to(memory_format=torch.channels_last), layout="channels_last") == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert select() == "plain"
        assert select(dtype="bfloat16") == "torch"
    with torch.enable_grad():
        assert select() == "plain"


def test_auto_follows_the_rows_of_the_packaged_table(monkeypatch):
    device = "cpu x86_64 AVX512"
    table = read_table(TABLE_PATH)[device]
    monkeypatch.setattr("mgcc_dist.kernels.dispatcher.device_name", lambda _: device)
    selected = set()
    for (op, implementation, mode, dtype, layout, shape), speedup in table.items():
        channels, height, width, out = shape
        dispatcher = fuse(UpConv(channels, out)).train(mode == "training")
        x = torch.empty(1, channels, height, width, memory_format=LAYOUTS[layout])
        cast = torch.autocast("cpu", getattr(torch, dtype), dtype != "float32")
        with torch.set_grad_enabled(dispatcher.training), cast:
            assert dispatcher.select(x) == (implementation if speedup >= 1 else "plain")
            assert dispatcher.select(x[:, :, :, 1:]) == "plain"
        selected |= {(op, implementation, mode)} if speedup >= 1 else set()
    assert selected == {("upconv", "torch", "training"), ("upconv", "torch", "evaluation")}


@torch.no_grad()
def test_auto_compiles_into_one_graph(tmp_path):
    model = fuse(nn.Sequential(UpConv(2, 3)), "auto", table(tmp_path / "measured.json")).eval()
    x = torch.randn(1, 2, 4, 4)
    assert model[0].select(x) == "torch"
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@torch.no_grad()
def test_gpu_name_lookup_does_not_break_the_compiled_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", torch._dynamo.disable(lambda device: "H100"))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("mgcc_dist.kernels.dispatcher.device_name", lambda device: measured.device_name(gpu))
    model = fuse(nn.Sequential(UpConv(2, 2), UpConv(2, 2)), "auto", table(tmp_path / "t.json", device="H100")).eval()
    assert torch._dynamo.explain(model)(torch.randn(1, 2, 4, 4)).graph_count == 1


@torch.no_grad()
def test_auto_warns_once_on_a_device_without_rows(tmp_path):
    model = fuse(nn.Sequential(UpConv(2, 2), UpConv(2, 2)), "auto", table(tmp_path / "t.json", device="another")).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.randn(1, 2, 4, 4))
    assert ["no measurements for" in str(warning.message) for warning in caught] == [True]


def test_fusing_again_changes_the_policy_and_keeps_the_weights():
    model, _ = network()
    keys = list(model.state_dict())
    fused = fuse(fuse(model, "auto"), "torch")
    assert list(fused.state_dict()) == keys
    dispatchers = [module for module in fused.modules() if type(module) is KernelDispatcher]
    assert {dispatcher.policy.kernels for dispatcher in dispatchers} == {"torch"}


def bytes_saved_by_a_step(model, images):
    return saved_bytes(lambda: model.train()(images), model.parameters())


def test_phase_up_convolution_saves_less_for_backward(without_perturbation):
    model, images = network(widths=(8, 16), size=64)
    assert bytes_saved_by_a_step(fuse(copy.deepcopy(model), "torch"), images) < bytes_saved_by_a_step(model, images)


@pytest.mark.interpreted
def test_triton_implementations_save_less_for_backward(without_perturbation):
    model, images = network(widths=(16, 16), size=32, auxiliary=1)
    assert bytes_saved_by_a_step(fuse(copy.deepcopy(model), "triton"), images) < bytes_saved_by_a_step(model, images)
