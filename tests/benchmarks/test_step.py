"""Every setting of the benchmarked training step runs, and the kernel settings really run the kernels."""

import functools
from dataclasses import asdict

import pytest
import torch

from benchmarks import step as step_module
from benchmarks.step import (
    SETTINGS,
    TOY_SIZE,
    TOY_WIDTHS,
    StepConfig,
    StepSettings,
    Unsupported,
    implementations,
    make_batches,
    package_step,
    released_step,
)
from benchmarks.train_step import enabled
from mgcc_dist.data.batch import ByteBatch
from mgcc_dist.kernels.dispatcher import fuse
from mgcc_dist.methods.config import MultiLevelCrossConsistencyConfig
from mgcc_dist.methods.method import build
from mgcc_dist.models.config import MGCCConfig

TINY = StepConfig(16, (4, 8), batch=1, steps=3, device="cpu", threads=1)
TOY = StepConfig(TOY_SIZE, TOY_WIDTHS, batch=1, steps=3, device="cpu", threads=1)


@pytest.fixture
def stubs(monkeypatch):
    """Stand-ins for what needs a GPU or minutes of compilation."""
    compile_ = torch.compile
    monkeypatch.setattr(step_module, "unsupported_reason", lambda settings, device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda module, inputs: module)
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_(model, backend="eager"))


@pytest.mark.parametrize(
    "names", [(), *((name,) for name in SETTINGS if name not in ("fused_kernels", "auto_kernels"))]
)
def test_every_setting_takes_training_steps(names, stubs):
    step, facts = package_step(enabled(names), TINY)
    losses = [step(number).item() for number in range(2)]
    assert all(0 < loss < 10 for loss in losses)
    assert facts == {}


def test_the_released_loop_takes_training_steps():
    step = released_step(TINY)
    assert 0 < step(0).item() < 10


def test_batches_can_be_pinned_and_are_those_of_the_loader(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    batches = make_batches(TOY, pinned=True)
    assert len(pinned) == 2 * len(batches)
    for batch in batches:
        assert isinstance(batch, ByteBatch)
        assert (batch.images.dtype, batch.masks.dtype) == (torch.uint8, torch.bool)
        on_device = batch.to("cpu")
        assert on_device.images.shape == (2, 1, TOY_SIZE, TOY_SIZE)
        assert -1 <= on_device.images.min() < -0.5
        assert 0.5 < on_device.images.max() <= 1
        assert 0 < on_device.masks.mean() < 1


@pytest.mark.parametrize("name", ["tf32", "cudnn_benchmark", "cuda_graphs", "fused_kernels"])
def test_settings_of_a_gpu_are_unsupported_on_a_cpu(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Unsupported, match=f"{name} needs a CUDA device"):
        package_step(enabled([name]), TOY)


def test_fused_kernels_are_unsupported_where_no_module_supports_one(stubs):
    with pytest.raises(Unsupported, match="no module of this network supports a Triton kernel"):
        package_step(StepSettings(fused_kernels=True), TOY)


def test_auto_kernels_are_unsupported_where_all_of_them_are_plain(stubs, monkeypatch, tmp_path):
    plain = functools.partial(fuse, table=tmp_path / "none.json")
    monkeypatch.setattr(step_module, "fuse", plain)
    with (
        pytest.warns(UserWarning, match="no measurements"),
        pytest.raises(Unsupported, match="lists no faster kernel for this device"),
    ):
        package_step(StepSettings(auto_kernels=True), TOY)


def test_implementations_are_counted_and_the_dispatchers_stay_as_they_were():
    network = fuse(build(MultiLevelCrossConsistencyConfig(), MGCCConfig(widths=TOY_WIDTHS)).network.train(), "torch")
    before = {name: dict(vars(module)) for name, module in network.named_modules()}
    counted = implementations(network, StepSettings(), TOY)
    assert counted["torch"] == 16  # the up-convolutions of four decoders
    assert {name: dict(vars(module)).keys() for name, module in network.named_modules()} == {
        name: attributes.keys() for name, attributes in before.items()
    }


def test_settings_can_be_named_in_results():
    assert asdict(StepSettings()) == dict.fromkeys(SETTINGS, False)
