"""Training throughput of 1, 2, 3, ... processes that share one GPU: does `runs_per_gpu` of a sweep pay off?

    python -m benchmarks.runs_per_gpu --paper --out benchmarks/results/runs_per_gpu.json
    python -m benchmarks.runs_per_gpu --size 128 --widths 16 32 64 128 256 --out FILE

Each process runs the step of benchmarks.train_step with --settings, independently of the others, as the runs of a sweep
do with `runs_per_gpu` (docs/how-to/cluster.md). All are timed over the same interval. `ratio` is the sum of their steps
per second over that of a single process; 1 means that they only take turns. Without a GPU the processes share the CPU's
cores, with --threads each.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import fork_context
from benchmarks.step import SETTINGS, StepConfig, StepSettings, package_step
from benchmarks.train_step import WARM_UP_STEPS, add_size_options, enabled, step_config
from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.errors import reason_of
from mgcc_dist.common.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    add_size_options(parser)
    parser.set_defaults(threads=1)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 3, 4], help="numbers of processes; 1 comes first")
    parser.add_argument("--seconds", type=float, default=10, help="timed interval for each of them (default: 10)")
    bf16 = ["bf16"] * torch.cuda.is_available()
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=["channels_last", *bf16])
    options = parser.parse_args()
    if options.runs[0] != 1:
        parser.error("--runs: the first number must be 1, because the others are compared with it")
    config = step_config(options, steps=0)
    settings = enabled(options.settings)
    header = benchmark_header("benchmarks.runs_per_gpu")
    facts = {"case": asdict(config), "settings": options.settings, "seconds": options.seconds}
    rows: dict[str, dict[str, Any]] = {}
    for number in options.runs:
        row = rows[f"{number} runs"] = throughput(number, settings, config, options.seconds)
        if "steps_per_second" in row:
            row["ratio"] = round(row["steps_per_second"] / rows["1 runs"]["steps_per_second"], 3)
        print(f"{number} runs: {row}", flush=True)
        write_json(options.out, {**header, **facts, "rows": rows})
    print(f"runs_per_gpu: {options.out}")


def throughput(number: int, settings: StepSettings, config: StepConfig, seconds: float) -> dict[str, Any]:
    """Return sum, lowest and highest steps per second of `number` processes; if one fails, the reason."""
    context = fork_context()
    with context.Manager() as manager, ProcessPoolExecutor(number, context) as pool:
        ready = manager.Barrier(number)
        futures = [pool.submit(train, settings, config, seconds, ready) for _ in range(number)]
        try:
            measured = [future.result() for future in futures]
        except Exception as error:  # of CUDA (out of memory comes first), a process that died, or a broken barrier
            if number == 1:
                raise
            return {"not_run": f"{type(error).__name__}: {reason_of(error)}"}
    speeds, peaks = zip(*measured, strict=True)
    return {
        "steps_per_second": round(sum(speeds), 3),
        "steps_per_second_lowest_highest": [round(min(speeds), 3), round(max(speeds), 3)],
        **({"peak_memory_mib": round(sum(peaks))} if config.device == "cuda" else {}),
    }


def train(settings: StepSettings, config: StepConfig, seconds: float, ready: Any) -> tuple[float, float]:
    """Return steps per second over `seconds`, timed once all processes are ready, and the peak GPU memory in MiB."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    try:
        step, _ = package_step(settings, config)
        for number in range(WARM_UP_STEPS):
            step(number).item()
    except Exception:
        ready.abort()
        raise
    ready.wait(timeout=600)
    started, number = time.perf_counter(), WARM_UP_STEPS
    while time.perf_counter() - started < seconds:
        step(number).item()  # counts completed steps, not queued ones
        number += 1
    elapsed = time.perf_counter() - started
    peak = torch.cuda.max_memory_reserved() / 2**20 if config.device == "cuda" else 0.0
    return (number - WARM_UP_STEPS) / elapsed, peak


if __name__ == "__main__":
    main()
