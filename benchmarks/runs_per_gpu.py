"""Whether several runs on one GPU pay: training steps per second of 1, 2, 3, ... processes that share it.

    python -m benchmarks.runs_per_gpu --out benchmarks/results/runs_per_gpu.json
    python -m benchmarks.runs_per_gpu --size 128 --widths 16 32 64 128 256 --out FILE

Each process takes the step of benchmarks.train_step with --settings, without the others' knowledge, as the runs of a
sweep do with `runs_per_gpu` (docs/how-to/cluster.md). All processes are timed over the same interval. `ratio` is the
sum of their steps per second divided by that of one process on its own: 1 means that they only take turns. Without a
GPU it measures processor cores, with --threads per process.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.train_step import SETTINGS, WARM_UP, Case, Rung, package_step
from mgcc_dist.common.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    cuda = torch.cuda.is_available()
    paper = [64, 128, 256, 512, 1024]
    parser.add_argument("--size", type=int, default=256 if cuda else 64, help="pixels a side (paper: 256)")
    parser.add_argument("--widths", type=int, nargs="+", default=paper if cuda else [8, 16, 32, 64])
    parser.add_argument("--batch", type=int, default=4, help="labeled images, and as many unlabeled (paper: 4)")
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 3, 4], help="how many at a time; 1 comes first")
    parser.add_argument("--seconds", type=float, default=10, help="time that is measured, each")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=["channels_last", *(["bf16"] * cuda)])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.runs[0] != 1:
        parser.error("--runs must begin with 1, which the others are compared with")
    device = "cuda" if cuda else "cpu"
    case = Case(options.size, tuple(options.widths), options.batch, 0, device, options.threads)
    rung = replace(Rung(), **dict.fromkeys(options.settings, True))
    rows: dict[str, dict[str, Any]] = {}
    for number in options.runs:
        row = rows[f"{number} runs"] = side_by_side(number, rung, case, options.seconds)
        if "steps_per_second" in row:
            row["ratio"] = round(row["steps_per_second"] / rows["1 runs"]["steps_per_second"], 3)
        print(f"{number} runs: {row}", flush=True)
    facts = {"case": asdict(case), "settings": options.settings, "seconds": options.seconds}
    write_json(options.out, {**describe(), **facts, "rows": rows})
    print(f"runs_per_gpu: {options.out}")


def side_by_side(number: int, rung: Rung, case: Case, seconds: float) -> dict[str, Any]:
    """Sum, lowest and highest of `number` processes; why not, where one fails (its memory is the first thing to go)."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(number, context) as pool:
        ready = manager.Barrier(number)
        futures = [pool.submit(train, rung, case, seconds, ready) for _ in range(number)]
        try:
            measured = [future.result() for future in futures]
        except Exception as error:  # of CUDA, of a process that died, or of the barrier that then broke
            if number == 1:
                raise
            return {"not_run": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    speeds, peaks = zip(*measured, strict=True)
    return {
        "steps_per_second": round(sum(speeds), 3),
        "steps_per_second_lowest_highest": [round(min(speeds), 3), round(max(speeds), 3)],
        **({"peak_memory_mib": round(sum(peaks))} if case.device == "cuda" else {}),
    }


def train(rung: Rung, case: Case, seconds: float, ready: Any) -> tuple[float, float]:
    """Steps per second over `seconds` from the moment that all are ready, and MiB of the GPU at most."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    try:
        step = package_step(rung, case)
        for number in range(WARM_UP):
            step(number).item()
    except Exception:
        ready.abort()
        raise
    ready.wait(timeout=600)
    began, number = time.perf_counter(), WARM_UP
    while time.perf_counter() - began < seconds:
        step(number).item()  # the clock must see steps that are over, not queued
        number += 1
    spent = time.perf_counter() - began
    peak = torch.cuda.max_memory_reserved() / 2**20 if case.device == "cuda" else 0.0
    return (number - WARM_UP) / spent, peak


if __name__ == "__main__":
    main()
