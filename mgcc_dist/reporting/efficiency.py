"""Table VII: parameters, multiply-accumulates (GMACs) and latency of a prediction.

fvcore counts the multiply-accumulates of convolutions and linear layers, and some operations of normalisation and
upsampling. The table lists the operations that fvcore does not count. The paper calls the same count GFLOPs; one
multiply-accumulate is two floating-point operations. Latency is measured on this machine, which the table names.
"""

import functools
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from mgcc_dist.bench.timing import capture_graph, median_cuda_ms
from mgcc_dist.common.config import Layer, resolve
from mgcc_dist.common.environment import processor
from mgcc_dist.common.errors import UserError
from mgcc_dist.inference.networks import NetworkSection
from mgcc_dist.models.network import build_network
from mgcc_dist.reporting.paper import PaperTable, load_paper_table
from mgcc_dist.reporting.views import NO_VALUE, Cell, ReportSection, TableView
from mgcc_dist.sweep.expansion import Sweep

IMAGE_SIZE = 256
CHANNELS = 3
WARM_UP = 3
REPEATS = {"cpu": 5, "cuda": 51}  # odd, so the median is a measured value


@dataclass(frozen=True)
class Cost:
    parameters: int
    macs: int
    """as counted by fvcore"""
    uncounted: dict[str, int]
    """operations that fvcore does not count: name -> number of calls"""
    latency: dict[str, float]
    """ms per image, by execution mode"""


@dataclass(frozen=True)
class Efficiency:
    sweep: Sweep
    paper: PaperTable | None
    machine: str
    repeats: int
    """number of predictions per latency, of which the median is reported"""
    costs: dict[str, Cost]
    """by row"""


def measure_sweep(sweep: Sweep) -> Efficiency:
    """Build and measure the inference network of each row: without auxiliary decoders, in evaluation mode.

    Raises:
        UserError: a row has keys other than those of `network`, or invalid ones.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paper = load_paper_table(sweep.paper) if sweep.paper else None
    machine = describe_machine(device)  # before the measurements raise the load average
    costs = {row: measure_cost(build_row_network(sweep, row), device) for row in sweep.rows}
    return Efficiency(sweep, paper, machine, REPEATS[device.type], costs)


def build_row_network(sweep: Sweep, row: str) -> nn.Module:
    keys = sweep.rows[row]
    if set(keys) != {"network"}:
        raise UserError(
            f"{sweep.name}: row {row!r} must have only network keys, got {', '.join(keys) or 'none'}. "
            "Pass a sweep file such as configs/sweeps/table_7.yaml to --efficiency."
        )
    section = resolve(NetworkSection, [Layer(keys, f"{sweep.path}: rows.{row}")])
    return build_network(section.network).inference_module().eval()


@torch.no_grad()
def measure_cost(network: nn.Module, device: torch.device, image_size: int = IMAGE_SIZE) -> Cost:
    """Measure the cost of one image [1,CHANNELS,image_size,image_size]; moves `network` to `device`."""
    network.to(device)
    image = torch.rand(1, CHANNELS, image_size, image_size, device=device)
    # The table lists uncounted operations, so no warnings; modules that are not called have nothing to count.
    counted = FlopCountAnalysis(network, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return Cost(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        macs=int(counted.total()),
        uncounted={name.removeprefix("aten::"): calls for name, calls in sorted(counted.unsupported_ops().items())},
        latency=_latency_cuda(network, image) if device.type == "cuda" else _latency_cpu(network, image),
    )


def describe_machine(device: torch.device) -> str:
    """Return the device name and, for a CPU, the threads and load that affect its speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    load = os.getloadavg()[0]  # over the last minute; other programs slow the measurement down
    return (
        f"{processor()} ({platform.machine()}), {threads} thread{'s' if threads > 1 else ''}, load average {load:.1f}"
    )


def _latency_cpu(network: nn.Module, image: Tensor) -> dict[str, float]:
    times = []
    for _ in range(WARM_UP + REPEATS[image.device.type]):
        start = time.perf_counter()
        network(image)
        times.append(1000 * (time.perf_counter() - start))
    return {"eager": statistics.median(times[WARM_UP:])}


def _latency_cuda(network: nn.Module, image: Tensor) -> dict[str, float]:
    """Time eager calls and CUDA graph replays, which exclude the Python overhead, with CUDA events."""
    call, repeats = functools.partial(network, image), REPEATS["cuda"]
    graph = capture_graph([call], WARM_UP)
    return {
        "eager": median_cuda_ms(call, repeats, WARM_UP),
        "CUDA graph": median_cuda_ms(graph.replay, repeats, WARM_UP),
    }


def efficiency_section(measured: Efficiency) -> ReportSection:
    paper, costs = measured.paper, measured.costs
    modes = list(next(iter(costs.values())).latency)
    paper_heading = ["paper"] if paper else []
    rows = []
    for name, cost in costs.items():
        published = paper.rows.get(name, {}) if paper else {}
        columns = {
            "params_M": [Cell(f"{cost.parameters / 1e6:.2f}")],
            "gflops": [Cell(f"{cost.macs / 1e9:.2f}")],
            "ms": [Cell(f"{cost.latency[mode]:.2f}") for mode in modes],
        }
        if paper:
            for key, cells in columns.items():
                cells.append(Cell(f"{published[key]:.2f}" if key in published else NO_VALUE))
        rows.append((name, [cell for cells in columns.values() for cell in cells]))
    groups = [
        ("Parameters, M", ["ours", *paper_heading]),
        ("GMACs", ["ours", *paper_heading]),
        ("Latency, ms", [*(f"ours, {mode}" for mode in modes), *paper_heading]),
    ]
    notes = [measured.sweep.notes, f"{paper.name} of the paper: {paper.setting}." if paper else ""]
    uncounted = "; ".join(f"{name}: {_format_calls(cost.uncounted)}" for name, cost in costs.items())
    return ReportSection(
        measured.sweep.title,
        [note for note in notes if note],
        [TableView(f"Batch 1, {CHANNELS}x{IMAGE_SIZE}x{IMAGE_SIZE}, float32, on {measured.machine}", groups, rows)],
        [
            "GMACs: billions of multiply-accumulates by fvcore, which the paper calls GFLOPs. "
            f"Not counted: {uncounted}.",
            f"Latency: median of {measured.repeats} predictions after {WARM_UP} warm-up runs. "
            "The paper's latency is from another machine.",
        ],
    )


def csv_rows(measured: Efficiency) -> Iterator[tuple[object, ...]]:
    """Yield rows in the columns of `formats.CSV_COLUMNS`."""
    for name, cost in measured.costs.items():
        published = measured.paper.rows.get(name, {}) if measured.paper else {}
        values = {"params_M": cost.parameters / 1e6, "gmacs": cost.macs / 1e9}
        values |= {f"ms, {mode}, {measured.machine}": ms for mode, ms in cost.latency.items()}
        for metric, ours in values.items():
            paper = published.get({"gmacs": "gflops"}.get(metric, metric.partition(",")[0]))
            difference = ours - paper if paper is not None and not metric.startswith("ms") else None
            key = (measured.sweep.name, name, None, None, metric, None, None)
            yield (*key, ours, None, paper, None, difference, *(None,) * 6)


def _format_calls(operations: dict[str, int]) -> str:
    return ", ".join(f"{calls} {name}" for name, calls in operations.items()) or "nothing"
