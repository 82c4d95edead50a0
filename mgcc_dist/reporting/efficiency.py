"""Table VII: what a prediction costs, as parameters, multiply-accumulates (GMACs) and latency.

fvcore counts the multiply-accumulates of convolutions and linear layers, and some operations for normalisation and
upsampling; of the others it says which they are, and so does the table. The paper calls the same count GFLOPs; a
multiply-accumulate is two floating-point operations. Latency is that of this machine, which the table names.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from mgcc_dist.common.config import flatten, parse
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.sweep_file import Sweep
from mgcc_dist.methods.config import MethodConfig
from mgcc_dist.methods.registry import build
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.reporting.grids import NONE, Grid, Section, Text
from mgcc_dist.reporting.paper import PaperTable, paper_table

IMAGE_SIZE = 256
CHANNELS = 3
WARM_UP = 3
REPEATS = {"cpu": 5, "cuda": 51}  # the median is one of them


@dataclass(frozen=True)
class Row:
    """The `network` section of a row."""

    network: NetworkConfig


@dataclass(frozen=True)
class Cost:
    parameters: int
    macs: int
    """as fvcore counts them"""
    uncounted: dict[str, int]
    """operations that fvcore does not count: name -> times"""
    latency: dict[str, float]
    """ms for one image, by the way of running it"""


@dataclass(frozen=True)
class Efficiency:
    sweep: Sweep
    paper: PaperTable | None
    machine: str
    repeats: int
    """predictions that a latency is the median of"""
    costs: dict[str, Cost]
    """by row"""


def measure(sweep: Sweep) -> Efficiency:
    """Build and measure the network of each row, as it predicts: without auxiliary decoders, in evaluation mode.

    Raises:
        UserError: a row has other keys than those of `network`, or wrong ones.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paper = paper_table(sweep.paper) if sweep.paper else None
    name = machine(device)
    costs = {row: cost(network_of(sweep, row), device) for row in sweep.rows}
    return Efficiency(sweep, paper, name, REPEATS[device.type], costs)


def network_of(sweep: Sweep, name: str) -> nn.Module:
    keys = sweep.rows[name]
    if set(keys) != {"network"}:
        raise UserError(
            f"{sweep.name}: row {name!r} must have network keys alone, got {', '.join(keys) or 'none'}; "
            "--efficiency reads sweep files such as configs/sweeps/table_7.yaml"
        )
    words = [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flatten(keys).items()
    ]
    network = parse(Row, "report", "", argv=words).network
    return build(MethodConfig(name="supervised"), network).predictor().eval()


@torch.no_grad()
def cost(network: nn.Module, device: torch.device, image_size: int = IMAGE_SIZE) -> Cost:
    """The cost of `network` for one image [1,CHANNELS,image_size,image_size]; leaves it on `device`."""
    network.to(device)
    image = torch.rand(1, CHANNELS, image_size, image_size, device=device)
    # What is not counted is said in the table, so no warning; modules that are not called have nothing to count.
    counted = FlopCountAnalysis(network, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return Cost(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        macs=int(counted.total()),
        uncounted={name.removeprefix("aten::"): times for name, times in sorted(counted.unsupported_ops().items())},
        latency=_latency_cuda(network, image) if device.type == "cuda" else _latency_cpu(network, image),
    )


def machine(device: torch.device) -> str:
    """Its name, and on a CPU what else decides how fast it is now."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")  # where platform.processor() is empty
    models = (
        [line for line in facts.read_text().splitlines() if line.startswith("model name")] if facts.exists() else []
    )
    name = models[0].partition(":")[2].strip() if models else platform.processor() or "CPU"
    threads = torch.get_num_threads()
    load = os.getloadavg()[0]  # of the last minute: other programs slow this one down
    return f"{name} ({platform.machine()}), {threads} thread{'s' if threads > 1 else ''}, load average {load:.1f}"


def _latency_cpu(network: nn.Module, image: Tensor) -> dict[str, float]:
    times = []
    for _ in range(WARM_UP + REPEATS[image.device.type]):
        began = time.perf_counter()
        network(image)
        times.append(1000 * (time.perf_counter() - began))
    return {"eager": statistics.median(times[WARM_UP:])}


def _latency_cuda(network: nn.Module, image: Tensor) -> dict[str, float]:
    """Between CUDA events: called from Python, and replayed as a CUDA graph, which leaves out Python's part."""
    stream = torch.cuda.Stream()  # a graph is captured off the default stream, after a warm-up there
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            network(image)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(image)

    def timed(run: nn.Module | torch.cuda.CUDAGraph) -> float:
        times = []
        for _ in range(WARM_UP + REPEATS[image.device.type]):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(image) if isinstance(run, nn.Module) else run.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times[WARM_UP:])

    return {"eager": timed(network), "CUDA graph": timed(graph)}


def section(measured: Efficiency) -> Section:
    paper, costs = measured.paper, measured.costs
    ways = list(next(iter(costs.values())).latency)
    beside = ["paper"] if paper else []
    rows = []
    for name, each in costs.items():
        theirs = paper.rows.get(name, {}) if paper else {}
        quantities = [(each.parameters / 1e6, "params_M"), (each.macs / 1e9, "gflops")]
        texts = [Text(f"{ours:.2f}") for ours, _ in quantities]
        texts += [Text(f"{each.latency[way]:.2f}") for way in ways]
        columns = [[texts[0]], [texts[1]], texts[2:]]
        for column, key in zip(columns, ("params_M", "gflops", "ms"), strict=True):
            if paper:
                column.append(Text(f"{theirs[key]:.2f}" if key in theirs else NONE))
        rows.append((name, [text for column in columns for text in column]))
    groups = [
        ("Parameters, M", ["ours", *beside]),
        ("GMACs", ["ours", *beside]),
        ("Latency, ms", [*(f"ours, {way}" for way in ways), *beside]),
    ]
    return Section(
        measured.sweep.title,
        [
            note
            for note in (measured.sweep.notes, f"{paper.name} of the paper: {paper.setting}." if paper else "")
            if note
        ],
        [Grid(f"Batch 1, {CHANNELS}x{IMAGE_SIZE}x{IMAGE_SIZE}, float32, on {measured.machine}", groups, rows)],
        [
            "GMACs: billions of multiply-accumulates by fvcore, which the paper calls GFLOPs. Not counted: "
            + "; ".join(f"{name}: {_listed(each.uncounted)}" for name, each in costs.items())
            + ".",
            f"Latency: median of {measured.repeats} after {WARM_UP} to warm up, beside whatever else the machine did. "
            "The paper's is of another machine.",
        ],
    )


def lines_of(measured: Efficiency) -> Iterator[tuple[object, ...]]:
    """Lines of a CSV file in the columns of `formats.COLUMNS`."""
    for name, each in measured.costs.items():
        theirs = measured.paper.rows.get(name, {}) if measured.paper else {}
        figures = {"params_M": each.parameters / 1e6, "gmacs": each.macs / 1e9}
        figures |= {f"ms, {way}, {measured.machine}": ms for way, ms in each.latency.items()}
        for metric, ours in figures.items():
            paper = theirs.get({"gmacs": "gflops"}.get(metric, metric.partition(",")[0]))
            difference = ours - paper if paper is not None and not metric.startswith("ms") else None
            place = (measured.sweep.name, name, None, None, metric, None, None)
            yield (*place, ours, None, paper, None, difference, *(None,) * 5)


def _listed(operations: dict[str, int]) -> str:
    return ", ".join(f"{times} {name}" for name, times in operations.items()) or "nothing"
