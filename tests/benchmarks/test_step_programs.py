"""The other programs that use the training step: its profile, and several runs on one device."""

import sys
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from benchmarks import profile_step, runs_per_gpu
from benchmarks.profile_step import kind_of, summarize
from benchmarks.runs_per_gpu import throughput
from benchmarks.step import StepConfig, StepSettings
from mgcc_dist.common.files import read_json

SIZE, WIDTHS = 16, (4, 8)
TINY = ["--size", str(SIZE), "--widths", *map(str, WIDTHS), "--batch", "1", "--threads", "1"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a program at a tiny size; returns the result it wrote."""

    def run(program, *words):
        out = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", ["program", "--out", str(out), *TINY, *words])
        program.main()
        return read_json(out)

    return run


def test_a_profile_divides_the_step_among_kinds_of_operation(run, tmp_path):
    result = run(profile_step, "--steps", "1", "--trace", str(tmp_path / "trace.json"))
    kinds = result["rows"]
    assert {
        "convolution, forward",
        "convolution, backward",
        "batch norm, forward",
        "outside operations",
    } <= kinds.keys()
    total = sum(row["milliseconds"] for row in kinds.values())
    assert total == pytest.approx(result["profiled_milliseconds_per_step"], abs=0.2)
    assert sum(row["share"] for row in kinds.values()) == pytest.approx(1, abs=0.01)
    assert result["milliseconds_per_step"] > 0
    assert result["heaviest"][0]["milliseconds"] >= result["heaviest"][-1]["milliseconds"] > 0
    assert (tmp_path / "trace.json").stat().st_size > 0


def event(key, device, milliseconds, **more):
    return SimpleNamespace(
        key=key,
        device_type=device,
        self_device_time_total=1000 * milliseconds,
        self_cpu_time_total=0,
        count=2,
        input_shapes=[[1, 2], []],
        **more,
    )


def test_a_kernel_counts_once_although_its_operation_reports_its_time_too():
    cuda, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [
        event("aten::cudnn_convolution", cpu, 6),
        event("cutlass_kernel", cuda, 6),
        event("gate_kernel_of_a_graph", cuda, 2),
        event("Optimizer.step#SGD.step", cuda, 8, is_user_annotation=True),
        event("aten::empty", cpu, 0),
    ]
    profiler = SimpleNamespace(key_averages=lambda group_by_input_shape=False: events)
    kinds, heaviest, kernels = summarize(profiler, StepConfig(32, (4, 8), 1, steps=2, device="cuda", threads=1))
    assert kinds == {"convolution, forward": {"milliseconds": 3.0, "calls": 1.0}}
    assert [row["operation"] for row in heaviest] == ["aten::cudnn_convolution"]
    assert heaviest[0]["shapes"] == [[1, 2]]
    assert [(row["kernel"], row["milliseconds"]) for row in kernels] == [
        ("cutlass_kernel", 3.0),
        ("gate_kernel_of_a_graph", 1.0),
    ]


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::convolution_backward", "convolution, backward"),
        ("aten::mkldnn_convolution", "convolution, forward"),
        ("aten::native_batch_norm_backward", "batch norm, backward"),
        ("aten::cat", "concatenation and slicing"),
        ("aten::unknown", "other"),
    ],
)
def test_operations_are_grouped_by_name(operation, kind):
    assert kind_of(operation) == kind


def test_runs_that_share_a_device_are_timed_together():
    config = StepConfig(SIZE, WIDTHS, batch=1, steps=0, device="cpu", threads=1)
    row = throughput(2, StepSettings(), config, seconds=0.2)
    low, high = row["steps_per_second_lowest_highest"]
    assert 0 < low <= high
    assert low + high == pytest.approx(row["steps_per_second"], abs=0.002)


def test_runs_that_fail_together_give_the_reason(run, monkeypatch):
    def fail(number, *_):
        return {"steps_per_second": 1.0} if number == 1 else {"not_run": "OutOfMemoryError: CUDA out of memory"}

    monkeypatch.setattr(runs_per_gpu, "throughput", fail)
    rows = run(runs_per_gpu, "--runs", "1", "2")["rows"]
    assert rows["1 runs"] == {"steps_per_second": 1.0, "ratio": 1.0}
    assert rows["2 runs"] == {"not_run": "OutOfMemoryError: CUDA out of memory"}
    with pytest.raises(SystemExit):
        run(runs_per_gpu, "--runs", "2", "3")
