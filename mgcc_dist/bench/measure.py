"""Measure one workload: check, count and time every variant, and derive the rows of the table that `auto` reads."""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mgcc_dist.bench import counts
from mgcc_dist.bench.roofline import Roofline
from mgcc_dist.bench.timing import DECIDING, alternate, conservative_speedup, median_and_quantiles, timers
from mgcc_dist.bench.variants import COMPILE, MAX_ERROR, PLAIN, Runner, Variant, relative_error
from mgcc_dist.kernels.measured import KEY_FIELDS
from mgcc_dist.kernels.operation import Workload

Times = dict[str, dict[str, list[list[float]]]]
"""timer -> variant -> milliseconds by round"""


@dataclass(frozen=True)
class Effort:
    rounds: int
    milliseconds: float
    """per variant, timer and round"""


@dataclass
class Measurement:
    """What was measured of one workload."""

    workload: Workload
    variants: dict[str, Variant]
    times: dict[str, Times]
    """by direction"""
    counts: dict[str, dict[str, float]]
    """variant -> error, saved and peak memory, launches"""
    not_run: dict[str, str]
    """variant, and which part of it -> reason"""


def measure(workload: Workload, variants: list[Variant], device: torch.device, effort: Effort) -> Measurement:
    """Check, count and time `variants` in alternation. A variant that raises is recorded and skipped."""
    measurement = Measurement(workload, {}, {}, {}, {})
    sets = _num_input_sets(workload, device)
    expected = _outputs(Runner(workload.module(device), workload.inputs(1, "contiguous", device), workload))
    runners: dict[str, Runner] = {}
    for variant in variants:
        runner = Runner(variant.module, workload.inputs(sets, variant.layout, device), workload)
        try:
            error = max(relative_error(ours, right) for ours, right in zip(_outputs(runner), expected, strict=True))
            if not error <= MAX_ERROR[workload.dtype]:
                raise ArithmeticError(f"relative error of the result is {error:.2g}")
            counted = _count(runner, variant.implementation, device)
            measurement.counts[variant.name] = {"error": float(f"{error:.2g}"), **counted}
        except Exception as failure:
            measurement.not_run[variant.name] = _message(failure)
        else:
            runners[variant.name] = runner
            measurement.variants[variant.name] = variant
    for direction in ("forward", "backward", "both") if workload.training else ("forward",):
        measurement.times[direction] = {}
        for timer_name, timer in timers(device, direction, effort.milliseconds).items():
            rounds = {}
            for name, runner in runners.items():
                try:
                    rounds[name] = timer(getattr(runner, direction), sets)
                except Exception as failure:
                    measurement.not_run[f"{name} {direction} {timer_name}"] = _message(failure)
            measurement.times[direction][timer_name] = alternate(rounds, effort.rounds)
            for runner in runners.values():
                runner.saved_outputs.clear()
    del runners
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measurement


def _outputs(runner: Runner) -> tuple[torch.Tensor, ...]:
    """Return the output, and in training also the input gradient."""
    y = runner.forward(0)
    return (y, runner.both(0)[0]) if runner.workload.training else (y,)


def _count(runner: Runner, implementation: str, device: torch.device) -> dict[str, float]:
    counted: dict[str, float] = {}
    call: Callable[[], object] = partial(runner.both if runner.workload.training else runner.forward, 0)
    if runner.workload.training and not implementation.startswith(COMPILE):  # hooks would change its graph
        saved = counts.saved_bytes(partial(runner.forward, 0), runner.module.parameters())
        counted["saved_mib"] = round(saved / 2**20, 3)
    if device.type == "cuda":
        counted["launches"] = counts.count_launches(call)
        counted["peak_mib"] = round(counts.peak_bytes(call) / 2**20, 3)
    return counted


def _num_input_sets(workload: Workload, device: torch.device) -> int:
    """Return enough input sets that, in alternation, none is still in the cache when it is used again."""
    if device.type == "cpu":
        return 2 if workload.input_bytes > 2**23 else 4
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(4 * cache // workload.input_bytes, 4), 64)


def _message(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"


def as_row(measurement: Measurement, roofline: Roofline) -> dict[str, Any]:
    """Return {direction: {variant: {timer: metrics}}}, with the minimum times, counts, and what was not run.

    Metrics are the median, the 20% and 80% quantiles, the share of the roofline, and the speedup over the fastest plain
    module and the fastest torch.compile by that timer (`ratio_to_best_...`).
    """
    workload = measurement.workload
    row: dict[str, Any] = {"floor_ms": {}, "counts": measurement.counts}
    for direction, times in measurement.times.items():
        directions = ("forward", "backward") if direction == "both" else (direction,)
        floor = roofline.floor(
            [phase for each in directions for phase in workload.roofline_phases(each)], workload.dtype
        )
        row["floor_ms"][direction] = round(floor, 5)
        row[direction] = {name: {} for name in measurement.variants}
        for timer, by_variant in times.items():
            medians = {name: median_and_quantiles(rounds)[0] for name, rounds in by_variant.items()}
            for name, rounds in by_variant.items():
                median, low, high = (round(ms, 5) for ms in median_and_quantiles(rounds))
                row[direction][name][timer] = {
                    "ms": median,
                    "ms_20_80": [low, high],
                    "roofline_share": round(floor / medians[name], 6),
                    **{
                        f"ratio_to_best_{baseline}": round(min(others) / medians[name], 3)
                        for baseline in (PLAIN, COMPILE)
                        if (others := [ms for other, ms in medians.items() if other.startswith(baseline)])
                    },
                }
    return row | ({"not_run": measurement.not_run} if measurement.not_run else {})


def add_variants(measurement: Measurement, more: Measurement) -> None:
    """Add variants of the same workload that were measured later."""
    measurement.variants |= more.variants
    measurement.counts |= more.counts
    measurement.not_run |= more.not_run
    for direction, times in more.times.items():
        for timer, by_variant in times.items():
            measurement.times[direction][timer] |= by_variant


def table_rows(measurement: Measurement) -> list[dict[str, Any]]:
    """Return a row of `kernels/measured.py` for each fused variant that the deciding timer could time.

    The baseline is the faster plain layout.
    """
    workload, rows = measurement.workload, []
    times = measurement.times["both" if workload.training else "forward"]
    by_variant = times.get(DECIDING) or next(iter(times.values()))
    plain = [rounds for name, rounds in by_variant.items() if name.startswith(PLAIN)]
    if not plain:
        return []
    fastest = min(plain, key=lambda rounds: median_and_quantiles(rounds)[0])
    for name, variant in measurement.variants.items():
        if name not in by_variant or variant.implementation.startswith((PLAIN, COMPILE)):
            continue
        speedup = conservative_speedup(fastest, by_variant[name])
        mode, dtype = workload.mode, workload.precision
        key = workload.op, variant.implementation, mode, dtype, variant.layout, workload.shape
        fields = dict(zip(KEY_FIELDS, key, strict=True))
        rows.append(fields | {"batch": workload.batch, "speedup": math.floor(1000 * speedup) / 1000})
    return rows
