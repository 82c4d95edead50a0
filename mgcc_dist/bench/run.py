"""Run the benchmark: measure all workloads within the time limit, and write results after each."""

import time
from collections.abc import Callable
from typing import Any

import torch

from mgcc_dist.bench.config import BenchConfig
from mgcc_dist.bench.measure import Effort, Measurement, add_variants, as_row, measure, table_rows
from mgcc_dist.bench.roofline import Roofline, fastest_convolutions
from mgcc_dist.bench.table import write_table
from mgcc_dist.bench.variants import COMPILE, compiled_variants, plain_and_fused
from mgcc_dist.bench.workloads import workloads
from mgcc_dist.common import environment
from mgcc_dist.common.files import write_json
from mgcc_dist.kernels.measured import device_name
from mgcc_dist.kernels.operation import Workload

OUT_OF_TIME = "out of time; increase --seconds"


def run_benchmark(options: BenchConfig) -> None:
    """Measure the operations that `options` choose, and write results, plot and table."""
    if options.png:
        from mgcc_dist.bench import plot  # matplotlib is optional: fail now, not after minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("bench: no GPU found. Measuring the CPU without Triton, torch.compile, launches and peak memory.")
    dtypes = [getattr(torch, name) for name in options.dtypes or _default_dtypes(device)]
    effort = _effort(device, options.quick)
    deadline = time.monotonic() + options.seconds
    # Before measuring, because the source may be edited meanwhile.
    where = environment.benchmark_header("mgcc_dist.bench", device)
    with fastest_convolutions():
        roofline = Roofline(device, dtypes, effort.milliseconds)
        print(f"bench: {device_name(device)}, {roofline.as_dict()}", flush=True)
        chosen = [each for each in workloads(device.type, dtypes, options.quick) if options.op in (None, each.op)]
        rows: dict[str, Any] = {}

        def save(measurement: Measurement) -> None:
            rows[measurement.workload.name] = as_row(measurement, roofline)
            if options.json:
                write_json(options.json, {**where, "roofline": roofline.as_dict(), "rows": rows, "not_run": {}})
            if options.write_table:
                write_table(options.write_table, table_rows(measurement), device_name(device), where)

        done, not_run = _measure_all(chosen, device, effort, deadline, save)
        if device.type == "cuda" and not (options.quick or options.no_compile):
            not_run |= _measure_compiled(done, device, effort, deadline, save)
    content = {**where, "roofline": roofline.as_dict(), "rows": rows, "not_run": not_run}
    print("\n".join(_summary(rows)), *(f"not run: {name}: {reason}" for name, reason in not_run.items()), sep="\n")
    if options.json:
        write_json(options.json, content)
        print(f"bench: wrote {options.json}")
    if options.png:
        plot.draw(content, options.png)
        print(f"bench: wrote {options.png}")
    if options.write_table:
        print(f"bench: wrote {options.write_table}")


def _default_dtypes(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return ["bfloat16"]
    return ["float32", "bfloat16"] if environment.has_bf16(device) else ["float32"]


def _effort(device: torch.device, quick: bool) -> Effort:
    if device.type == "cuda":
        return Effort(3, 10 if quick else 20)
    return Effort(5 if quick else 11, 20 if quick else 60)


def _measure_all(
    chosen: list[Workload],
    device: torch.device,
    effort: Effort,
    deadline: float,
    save: Callable[[Measurement], None],
) -> tuple[dict[str, Measurement], dict[str, str]]:
    """Return the measurements by workload name, and why workloads were not run."""
    done, not_run = dict[str, Measurement](), dict[str, str]()
    for workload in chosen:
        if time.monotonic() > deadline:
            not_run[workload.name] = OUT_OF_TIME
            continue
        variants, unsupported = plain_and_fused(workload, device, triton=device.type == "cuda")
        done[workload.name] = measure(workload, variants, device, effort)
        done[workload.name].not_run |= unsupported
        save(done[workload.name])
        print(f"bench: {workload.name}", flush=True)
    return done, not_run


def _measure_compiled(
    done: dict[str, Measurement],
    device: torch.device,
    effort: Effort,
    deadline: float,
    save: Callable[[Measurement], None],
) -> dict[str, str]:
    """Add torch.compile to the measurements; return what was not run."""
    not_run = {}
    for name, measurement in done.items():
        if time.monotonic() > deadline:
            not_run[f"{COMPILE} {name}"] = OUT_OF_TIME
            continue
        variants = compiled_variants(measurement.workload, device)
        add_variants(measurement, measure(measurement.workload, variants, device, effort))
        save(measurement)
        print(f"bench: {COMPILE} {name}", flush=True)
    return not_run


def _summary(rows: dict[str, Any]) -> list[str]:
    """Return a line per workload, direction and variant, by the first timer."""
    lines = []
    for name, row in rows.items():
        for direction in row["floor_ms"]:
            for variant, by_timer in row[direction].items():
                for found in list(by_timer.values())[:1]:
                    share, speedup = found["roofline_share"], found.get("ratio_to_best_plain", "")
                    metrics = f"{found['ms']:10.4f} ms {share:7.1%} of roofline {speedup:6} x"
                    lines.append(f"{name:50} {direction:8} {variant:36} {metrics}")
    return lines
