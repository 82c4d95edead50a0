"""Table VII: parameters, multiply-accumulates (GMACs) and latency of a prediction.

fvcore counts the multiply-accumulates of convolutions and linear layers, and some operations of normalisation and
upsampling. The table lists the operations that fvcore does not count. The paper calls the same count GFLOPs; one
multiply-accumulate is two floating-point operations. Latency is measured on this machine, which the table names.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mgcc_dist.reporting.paper import PaperTable
from mgcc_dist.reporting.views import NO_VALUE, Cell, ReportSection, TableView
from mgcc_dist.sweep.expansion import Sweep

IMAGE_SIZE = 256
CHANNELS = 3
WARM_UP = 3


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


def efficiency_section(measured: Efficiency) -> ReportSection:
    """Return the table of parameters, MACs and latency, next to the paper's values if the sweep names a table."""
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
