"""One workload: every candidate checked, counted and timed, and what of it belongs into the table that `auto` reads."""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mgcc_dist.kernels.bench import counts
from mgcc_dist.kernels.bench.candidates import COMPILE, ERROR, PLAIN, Calls, Candidate, error
from mgcc_dist.kernels.bench.roofline import Roofline
from mgcc_dist.kernels.bench.timing import at_least, clocks, figures, take_turns
from mgcc_dist.kernels.bench.workloads import Workload
from mgcc_dist.kernels.measured import KEY

Times = dict[str, dict[str, list[list[float]]]]
"""clock -> candidate -> milliseconds by rounds"""


@dataclass(frozen=True)
class Effort:
    rounds: int
    milliseconds: float
    """of one candidate's turn by one clock"""


@dataclass
class Measured:
    workload: Workload
    candidates: dict[str, Candidate]
    times: dict[str, Times]
    """by direction"""
    counted: dict[str, dict[str, float]]
    """candidate -> figures"""
    not_run: dict[str, str]
    """candidate, and what of it, -> why"""


def measure(workload: Workload, candidates: list[Candidate], device: torch.device, effort: Effort) -> Measured:
    """Whatever a candidate throws is noted, and the others go on."""
    measured = Measured(workload, {}, {}, {}, {})
    sets = _input_sets(workload, device)
    reference = _result(Calls(workload.module(device), workload.inputs(1, "contiguous", device), workload))
    calls: dict[str, Calls] = {}
    for candidate in candidates:
        inputs = workload.inputs(sets, candidate.layout, device)
        one = Calls(candidate.module, inputs, workload)
        try:
            wrong = max(error(ours, right) for ours, right in zip(_result(one), reference, strict=True))
            if not wrong <= ERROR[workload.dtype]:
                raise ArithmeticError(f"its result is off by {wrong:.2g}")
            measured.counted[candidate.name] = {"error": float(f"{wrong:.2g}"), **_count(one, candidate.form, device)}
        except Exception as failure:
            measured.not_run[candidate.name] = _why(failure)
        else:
            calls[candidate.name] = one
            measured.candidates[candidate.name] = candidate
    for direction in ("forward", "backward", "both") if workload.training else ("forward",):
        measured.times[direction] = {}
        for clock_name, clock in clocks(device, direction, effort.milliseconds).items():
            ready = {}
            for name, one in calls.items():
                try:
                    ready[name] = clock(getattr(one, direction), sets)
                except Exception as failure:
                    measured.not_run[f"{name} {direction} {clock_name}"] = _why(failure)
            measured.times[direction][clock_name] = take_turns(ready, effort.rounds)
            for one in calls.values():
                one.kept.clear()
    del calls
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measured


def _result(calls: Calls) -> tuple[torch.Tensor, ...]:
    """The output, and in training the gradient of the input."""
    y = calls.forward(0)
    return (y, calls.both(0)[0]) if calls.workload.training else (y,)


def _count(calls: Calls, form: str, device: torch.device) -> dict[str, float]:
    counted: dict[str, float] = {}
    call: Callable[[], object] = partial(calls.both if calls.workload.training else calls.forward, 0)
    if calls.workload.training and not form.startswith(COMPILE):  # whose graph depends on who hooks into it
        kept = counts.saved_bytes(partial(calls.forward, 0), calls.module.parameters())
        counted["saved_mib"] = round(kept / 2**20, 3)
    if device.type == "cuda":
        counted["launches"] = counts.launches(call)
        counted["peak_mib"] = round(counts.peak_bytes(call) / 2**20, 3)
    return counted


def _input_sets(workload: Workload, device: torch.device) -> int:
    """So many that a call finds none of its input in the cache, when they take turns."""
    if device.type == "cpu":
        return 2 if workload.input_bytes > 2**23 else 4
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(4 * cache // workload.input_bytes, 4), 64)


def _why(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"


def as_row(measured: Measured, roofline: Roofline) -> dict[str, Any]:
    """{direction: {candidate: {clock: figures}}}, with floors, counts and what was not run beside it.

    Figures are the median, its 20 and 80 % quantiles, the share of the roofline, and how many times as fast a candidate
    was as the best plain module and the best torch.compile by that clock.
    """
    workload = measured.workload
    row: dict[str, Any] = {"floor_ms": {}, "counts": measured.counted}
    for direction, times in measured.times.items():
        directions = ("forward", "backward") if direction == "both" else (direction,)
        floor = roofline.floor([phase for each in directions for phase in workload.phases(each)], workload.dtype)
        row["floor_ms"][direction] = round(floor, 5)
        row[direction] = {name: {} for name in measured.candidates}
        for clock, by_candidate in times.items():
            medians = {name: figures(rounds)[0] for name, rounds in by_candidate.items()}
            for name, rounds in by_candidate.items():
                middle, low, high = (round(ms, 5) for ms in figures(rounds))
                row[direction][name][clock] = {
                    "ms": middle,
                    "ms_20_80": [low, high],
                    "roofline_share": round(floor / medians[name], 6),
                    **{
                        f"ratio_to_best_{base}": round(min(others) / medians[name], 3)
                        for base in (PLAIN, COMPILE)
                        if (others := [ms for other, ms in medians.items() if other.startswith(base)])
                    },
                }
    return row | ({"not_run": measured.not_run} if measured.not_run else {})


def merge(measured: Measured, more: Measured) -> None:
    """Put what was measured later of the same workload beside it."""
    measured.candidates |= more.candidates
    measured.counted |= more.counted
    measured.not_run |= more.not_run
    for direction, times in more.times.items():
        for clock, by_candidate in times.items():
            measured.times[direction][clock] |= by_candidate


def table_rows(measured: Measured) -> list[dict[str, Any]]:
    """A row for each form, as `kernels/measured.py` has them; `plain` is its faster layout by that clock."""
    workload, rows = measured.workload, []
    times = measured.times["both" if workload.training else "forward"]
    for name, candidate in measured.candidates.items():
        if candidate.form.startswith((PLAIN, COMPILE)):
            continue
        ratios = []
        for by_candidate in times.values():
            plain = [rounds for other, rounds in by_candidate.items() if other.startswith(PLAIN)]
            if name in by_candidate and plain:
                ratios.append(at_least(min(plain, key=lambda rounds: figures(rounds)[0]), by_candidate[name]))
        if ratios:
            key = workload.op, candidate.form, workload.mode, workload.precision, candidate.layout, workload.shape
            named = dict(zip(KEY, key, strict=True))
            rows.append(named | {"batch": workload.batch, "ratio": math.floor(1000 * min(ratios)) / 1000})
    return rows
