"""The benchmark's results and table on a CPU; CUDA is replaced by stubs."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.compare import metrics as metrics_of_file
from mgcc_dist.bench import __main__ as program
from mgcc_dist.bench import counts, run, timing, variants
from mgcc_dist.bench.config import BenchConfig
from mgcc_dist.bench.measure import Effort, add_variants, as_row, measure, table_rows
from mgcc_dist.bench.table import write_table
from mgcc_dist.bench.variants import Runner, compiled_variants, plain_and_fused
from mgcc_dist.bench.workloads import workloads
from mgcc_dist.common.command_line import parse
from mgcc_dist.common.errors import UserError
from mgcc_dist.kernels import TABLE_PATH
from mgcc_dist.kernels import measured as table
from mgcc_dist.kernels.dispatcher import fuse
from mgcc_dist.kernels.operation import LAYOUTS, Workload, specs
from mgcc_dist.models.blocks import UpConv

CPU = torch.device("cpu")
BRIEF = Effort(rounds=2, milliseconds=1)


def workload(op="upconv", shape=(8, 4, 4, 4), dtype=torch.float32, training=False, batch=2):
    return Workload(op, shape, batch, dtype, training)


def measure_briefly(each):
    return measure(each, plain_and_fused(each, CPU, triton=False)[0], CPU, BRIEF)


@pytest.fixture
def tiny_run(monkeypatch):
    """Run the benchmark on two tiny workloads."""
    monkeypatch.setattr(run, "workloads", lambda device, dtypes, quick: [workload(), workload(training=True)])
    monkeypatch.setattr(run, "_effort", lambda device, quick: BRIEF)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda *arguments: program.main(["--quick", "--dtypes", "float32", *map(str, arguments)])


def test_benchmark_on_a_cpu_writes_results_plot_and_table(tiny_run, tmp_path, capsys):
    result, plot = tmp_path / "b.json", tmp_path / "b.png"
    tiny_run("--json", result, "--png", plot, "--write-table", tmp_path / "measured.json")
    assert capsys.readouterr().out.startswith("bench: no GPU found")
    content = json.loads(result.read_text())
    assert list(content["rows"]) == ["upconv 8x4x4x4 B2 float32 evaluation", "upconv 8x4x4x4 B2 float32 training"]
    names = {f"{name} {layout}" for name in ("plain", "torch") for layout in LAYOUTS}
    for row, directions in zip(content["rows"].values(), (["forward"], ["forward", "backward", "both"]), strict=True):
        assert list(row["floor_ms"]) == directions
        for direction in directions:
            assert set(row[direction]) == names
            found = [metrics for by_timer in row[direction].values() for metrics in by_timer.values()]
            assert len(found) == len(names)
            assert all(each["ms_20_80"][0] <= each["ms"] <= each["ms_20_80"][1] for each in found)
            assert all(each["roofline_share"] > 0 for each in found)
            assert 1.0 in [each["ratio_to_best_plain"] for each in found]
        assert ("saved_mib" in row["counts"]["torch contiguous"]) == (len(directions) == 3)
    assert sum(name.endswith(" / ms") for name in metrics_of_file(content)) == 4 + 3 * 4
    assert {"versions", "commit", "processor", "threads", "load", "roofline", "command"} <= content.keys()
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = table.read_rows(tmp_path / "measured.json")
    keys = {(row["implementation"], row["mode"], row["layout"]) for row in rows}
    assert keys == {("torch", mode, each) for mode in ("evaluation", "training") for each in LAYOUTS}
    assert {row["device"] for row in rows} == {table.CPU}


def test_write_table_without_a_file_means_the_table_that_auto_reads():
    assert parse(BenchConfig, ["--write-table", "--quick"]).write_table == TABLE_PATH
    assert parse(BenchConfig, ["--quick"]).write_table is None


def test_an_operation_that_does_not_exist_is_rejected_with_the_nearest():
    with pytest.raises(UserError, match=r"^--op upcon: unknown operation\. Did you mean upconv\?$"):
        program.main(["--op", "upcon"])


@torch.no_grad()
def test_auto_follows_the_written_rows(tmp_path):
    path, measurement = tmp_path / "measured.json", measure_briefly(workload())
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    for milliseconds, expected in ((0.5, "torch"), (1.0, "torch"), (1.01, "plain")):
        measurement.times["forward"] = {"timer": {name: [[1.0]] * 5 for name in measurement.variants}}
        measurement.times["forward"]["timer"]["torch channels_last"] = [[milliseconds]] * 5
        write_table(path, table_rows(measurement), table.CPU, {})
        assert fuse(UpConv(8, 4), "auto", path).eval().select(x) == expected


def test_speedup_is_over_the_faster_layout_by_the_graph_timer_where_there_is_one():
    measurement = measure_briefly(workload())
    times = {"plain contiguous": [[4.0]], "plain channels_last": [[3.0]], "torch contiguous": [[2.0]]}
    slow_launches = times | {"torch contiguous": [[10.0]]}
    measurement.times["forward"] = {"events_cold": slow_launches, "graph_cold": times, "graph_warm": slow_launches}
    (row,) = table_rows(measurement)
    assert (row["layout"], row["speedup"]) == ("contiguous", 1.5)
    measurement.times["forward"]["graph_cold"] = {"plain contiguous": [[4.0]]}  # the variant could not be captured
    assert table_rows(measurement) == []


def test_speedup_is_reached_in_four_rounds_of_five():
    baseline = [[3.0], [2.0], [1.0], [3.0], [3.0], [3.0]]
    assert timing.conservative_speedup(baseline, [[1.0]] * 6) == 2.0
    assert timing.median_and_quantiles([[1.0, 2.0], [3.0, 4.0, 5.0, 100.0]]) == [3.5, 2.0, 5.0]


def test_variants_alternate_and_each_starts_a_round():
    order = []
    rounds = {name: lambda name=name: order.append(name) or [1.0] for name in "abc"}
    assert timing.alternate(rounds, 3) == {name: [[1.0]] * 3 for name in "abc"}
    assert "".join(order) == "abcbcacab"


def test_table_keeps_other_rows_and_reads_the_lowest_speedup_over_batches(tmp_path):
    path = tmp_path / "measured.json"
    row = {"op": "upconv", "implementation": "torch", "mode": "training", "dtype": "float32", "layout": "contiguous"}
    row |= {"shape": [1, 2, 3, 4]}
    write_table(path, [row | {"batch": batch, "speedup": batch} for batch in (1, 2, 8)], "A", {"date": "old"})
    write_table(path, [row | {"batch": 1, "speedup": 0.5}], "B", {})
    write_table(path, [row | {"batch": 1, "speedup": 3}], "A", {"date": "new"})
    assert table.read_table(path) == {
        device: {table.row_key(row): speedup} for device, speedup in (("A", 2), ("B", 0.5))
    }
    assert json.loads(path.read_text())["devices"]["A"] == {"date": "new"}


def test_wrong_or_failing_variant_is_reported_and_not_timed():
    each = workload(training=True)
    found, _ = plain_and_fused(each, CPU, triton=False)
    wrong, failing = (variant for variant in found if variant.implementation == "torch")
    forward = wrong.module.forward
    wrong.module.forward = lambda x: 1.5 * forward(x)
    failing.module.forward = lambda x: x.no_such_thing()
    measurement = measure(each, found, CPU, BRIEF)
    assert "relative error of the result" in measurement.not_run[wrong.name]
    assert "no_such_thing" in measurement.not_run[failing.name]
    (by_variant,) = measurement.times["both"].values()
    assert set(by_variant) == {"plain contiguous", "plain channels_last"}
    assert table_rows(measurement) == []


def test_a_benchmark_that_fails_keeps_the_results_and_table_of_earlier_workloads(tiny_run, tmp_path, monkeypatch):
    def fail_on_training(each, *args):
        if each.training:
            raise RuntimeError("out of memory")
        return measure(each, *args)

    monkeypatch.setattr(run, "measure", fail_on_training)
    with pytest.raises(RuntimeError, match="out of memory"):
        tiny_run("--json", tmp_path / "b.json", "--write-table", tmp_path / "own_table.json")
    assert list(json.loads((tmp_path / "b.json").read_text())["rows"]) == ["upconv 8x4x4x4 B2 float32 evaluation"]
    assert {row["mode"] for row in table.read_rows(tmp_path / "own_table.json")} == {"evaluation"}


def test_workloads_skipped_for_lack_of_time_are_listed(tiny_run, tmp_path, capsys):
    tiny_run("--seconds", "-1", "--json", tmp_path / "b.json")
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["rows"] == {}
    assert len(content["not_run"]) == 2
    assert "increase --seconds" in capsys.readouterr().out


def test_minimum_times_match_a_calculation_by_hand():
    def microseconds(*arguments, direction="forward", training=True):  # on an H100: 800 TFLOP/s, 3 TB/s
        phases = Workload(*arguments, torch.bfloat16, training).roofline_phases(direction)
        return 1e6 * sum(max(flops / 800e12, moved / 3e12) for flops, moved in phases)

    layer, gate = ("convmixer", (1024, 16, 16, 7), 8), ("msag", (64, 256, 256), 8)
    assert microseconds(*layer) == pytest.approx(8.2, abs=0.1)
    assert microseconds(*layer, direction="backward") == pytest.approx(14.9, abs=0.1)
    assert microseconds("mixer", (1024, 16, 16, 7, 9), 64) == pytest.approx(9 * 65, rel=0.02)
    assert microseconds(*gate, training=False) == pytest.approx(118, abs=1)
    assert microseconds(*gate) == pytest.approx(102 + 89.5 + 67, abs=1)
    assert microseconds(*gate, direction="backward") == pytest.approx(582, abs=1)
    # 16 multiply-adds per four outputs, not 36.
    gemm_microseconds = 2 * 16 * (8 * 16 * 16) * 1024 * 512 / 800e6
    assert microseconds("upconv", (1024, 16, 16, 512), 8, training=False) == pytest.approx(gemm_microseconds)


def test_workload_shapes_match_the_lookup_of_fuse():
    for device in ("cpu", "cuda"):
        for each in workloads(device, [torch.float32], quick=True):
            small = Workload(each.op, (16, 2, 2, *each.shape[3:]), 1, each.dtype, each.training)
            (x,) = small.inputs(1, "channels_last", CPU)
            assert (*x.shape[1:], *specs()[each.op].sizes(small.module(CPU))) == small.shape
            assert table.layout_name(x) == "channels_last"


def test_autocast_workloads_have_half_precision_inputs_and_float32_weights():
    half = workload(dtype=torch.bfloat16, training=True)
    runner = Runner(half.module(CPU), half.inputs(2, "contiguous", CPU), half)
    assert runner.forward(1).dtype == torch.bfloat16
    gradients = runner.backward(1)
    assert [g.dtype for g in gradients] == [torch.bfloat16, *(p.dtype for p in runner.parameters)]
    for ours, again in zip(gradients, runner.backward(1), strict=True):
        torch.testing.assert_close(ours, again, rtol=0, atol=0)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("op", "shape", "training", "implementations"),
    [
        ("upconv", (16, 4, 4, 16), False, {"torch", "triton"}),
        ("mixer", (2, 16, 16, 3, 1), True, {"triton"}),
        ("msag", (16, 4, 4), False, {"triton single_kernel", "triton two_kernels", "triton aten_convolutions"}),
    ],
)
def test_triton_implementations_are_checked_and_timed_in_their_modes(op, shape, training, implementations):
    each = workload(op, shape, training=training, batch=1)
    found, unsupported = plain_and_fused(each, CPU, triton=True)
    assert unsupported == {}
    measurement = measure(each, found, CPU, Effort(rounds=1, milliseconds=0))
    assert measurement.not_run == {}
    assert {row["implementation"] for row in table_rows(measurement)} == implementations


def test_unsupported_implementation_is_listed_with_its_reason():
    found, unsupported = plain_and_fused(workload(training=True), CPU, triton=True)
    assert {variant.implementation for variant in found} == {"plain", "torch"}
    assert "evaluation without gradients" in unsupported["triton contiguous"]


def test_compiled_variants_are_added_to_the_others(monkeypatch):
    each = workload()
    compiled = compiled_variants(each, CPU)  # Inductor rejects unknown options
    assert [variant.name for variant in compiled] == [
        "compile default channels_last",
        "compile max-autotune channels_last",
        "compile forced-layout contiguous",
    ]
    monkeypatch.setattr(variants, "COMPILED", (("eager", "contiguous", {"backend": "eager"}),))
    measurement = measure_briefly(each)
    add_variants(measurement, measure(each, compiled_variants(each, CPU), CPU, BRIEF))
    row = as_row(measurement, SimpleNamespace(floor=lambda phases, dtype: 1.0))
    assert "compile eager contiguous" in row["forward"]
    for by_timer in row["forward"].values():
        assert all(found["ratio_to_best_compile"] > 0 for found in by_timer.values())
    assert {each["implementation"] for each in table_rows(measurement)} == {"torch"}


class Stub:
    """Replaces CUDA streams, graphs and events; every interval is one millisecond."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, other):
        pass

    def replay(self):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1.0


@pytest.fixture
def cuda_stubs(monkeypatch):
    for name in ("Stream", "CUDAGraph", "Event", "stream", "graph", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, Stub)


@pytest.mark.parametrize(("cold", "captured"), [(True, [*range(4)] * 5), (False, [0] * 20)])
def test_cuda_graph_captures_twenty_calls_on_alternating_inputs_or_on_one(cold, captured, cuda_stubs):
    seen = []
    one_round = timing.cuda_graph_timer(0.2, cold)(seen.append, 4)
    assert seen[4:] == captured
    assert one_round() == [1 / 20] * 3


def test_a_graph_is_captured_after_its_warm_up_on_a_side_stream(monkeypatch):
    order = []

    class Recorder(Stub):
        def __init__(self, *words):
            self.name = "side" if not words else words[0]

        def wait_stream(self, other):
            order.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            order.append(f"enter {getattr(self.name, 'name', self.name)}")

    for name, stub in (("Stream", Recorder), ("stream", Recorder), ("CUDAGraph", Recorder)):
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Recorder("main"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Recorder("graph"))
    timing.capture_graph([lambda: order.append("call")], warm_up=1)
    assert order == ["side waits for main", "enter side", "call", "main waits for side", "enter graph", "call"]


def test_median_excludes_the_warm_up_calls(cuda_stubs, monkeypatch):
    intervals = iter([100.0, 100.0, 1.0, 2.0, 9.0])
    monkeypatch.setattr(Stub, "elapsed_time", lambda self, end: next(intervals))
    called = []
    assert timing.median_cuda_ms(lambda: called.append(1), repeats=3, warm_up=2) == 2.0
    assert len(called) == 5


def test_do_bench_alternates_between_inputs(monkeypatch):
    seen = []
    monkeypatch.setattr("triton.testing.do_bench", lambda call, **arguments: [call() or 2.0 for _ in range(3)])
    one_round = timing.cuda_event_timer(5.0)(seen.append, 2)
    assert one_round() + one_round() == [2.0] * 6
    assert seen == [0, 1, 0, 1, 0, 1]


def test_launches_count_kernels_and_not_copies(monkeypatch, cuda_stubs):
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [("gemm", cuda), ("Memcpy DtoD", cuda), ("Memset (Device)", cuda), ("aten::mm", cpu), ("relu", cuda)]
    Stub.events = staticmethod(lambda: [SimpleNamespace(name=name, device_type=kind) for name, kind in events])
    monkeypatch.setattr(torch.profiler, "profile", Stub)
    assert counts.count_launches(lambda: None) == 2


@pytest.mark.gpu
def test_gpu_results_have_every_timer_and_count(tmp_path):
    program.main(["--op", "upconv", "--quick", "--json", str(tmp_path / "b.json")])
    for row in json.loads((tmp_path / "b.json").read_text())["rows"].values():
        assert all(name.startswith("triton") for name in row.get("not_run", ()))
        assert set(row["forward"]["torch channels_last"]) == {"events_cold", "graph_cold", "graph_warm"}
        assert row["counts"]["torch channels_last"]["launches"] > 0
