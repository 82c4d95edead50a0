"""Where the time of one MGCC training step goes, by kind of operation, from torch's profiler.

    python -m benchmarks.profile_step --out benchmarks/results/profile_step-cpu.json
    python -m benchmarks.profile_step --size 256 --widths 64 128 256 512 1024 --settings channels_last bf16 --out FILE

The step is that of benchmarks.train_step with `--settings` (default: channels_last, as `segment` trains). Times are of
the device: of the GPU's kernels where there is one, else of the processor's operations without what they call. What is
left of the step's own duration is `between operations`: Python, autograd's bookkeeping, and the profiler itself.
"""

import argparse
import re
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe
from benchmarks.train_step import SETTINGS, Case, Rung, package_step
from mgcc_dist.common.files import write_json

# The first that an operation's name matches is its kind.
KINDS = {
    "convolution, backward": r"conv\w*_backward|dgrad|wgrad|bgrad",
    "convolution, forward": r"conv|implicit_gemm|xmma|cutlass",
    "batch norm, backward": r"batch_norm\w*backward|bn_bw",
    "batch norm, forward": r"batch_norm|bn_fw",
    "ReLU, GELU and sigmoid": r"relu|clamp_min|threshold|gelu|sigmoid",
    "upsampling": r"upsampl",
    "joining and splitting": r"aten::(cat|slice|narrow|split|select|as_strided)|CatArray",
    "copies and layouts": r"copy|_to_copy|clone|contiguous|Memcpy|transpose",
    "perturbations": r"bernoulli|rand|uniform|amax|aten::lt",
    "optimizer": r"foreach|_fused|Optimizer|multi_tensor",
    "elementwise, sums": r"aten::(add|mul|div|sub|sum|mean|neg|pow|fill|zero)_?|elementwise|reduce_kernel",
}
ROWS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--trace", type=Path, help="also write the timeline, for Chrome's or Perfetto's viewer")
    parser.add_argument("--size", type=int, default=128, help="pixels a side (paper: 256)")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="(paper: 64 to 1024)")
    parser.add_argument("--batch", type=int, default=4, help="labeled images, and as many unlabeled (paper: 4)")
    parser.add_argument("--steps", type=int, default=3, help="profiled steps, after two that are not")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=["channels_last"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(options.size, tuple(options.widths), options.batch, options.steps, device, options.threads)
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    step = package_step(replace(Rung(), **dict.fromkeys(options.settings, True)), case)
    for number in range(2):
        step(number).item()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        began = time.perf_counter()
        for number in range(2, 2 + case.steps):
            loss = step(number)
        loss.item()
        seconds = (time.perf_counter() - began) / case.steps
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))

    rows, heaviest = summary(profiler, case)
    spent = sum(row["milliseconds"] for row in rows.values())
    rows["between operations"] = {"milliseconds": 1000 * seconds - spent, "share": 0.0, "calls": 0}
    for row in (*rows.values(), *heaviest):
        row["share"] = round(row["milliseconds"] / (1000 * seconds), 4)
        row["milliseconds"] = round(row["milliseconds"], 2)
    facts = {"case": asdict(case), "settings": options.settings, "milliseconds_a_step": round(1000 * seconds, 1)}
    write_json(options.out, {**describe(), **facts, "rows": rows, "heaviest": heaviest})
    for kind, row in rows.items():
        print(f"{kind:26} {row['milliseconds']:10.1f} ms {100 * row['share']:6.1f} %  {row['calls']:6g} calls a step")
    print(f"profile_step: {1000 * seconds:.1f} ms a step -> {options.out}")


def summary(profiler: profile, case: Case) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """By kind, the longest first; and the ROWS operations and shapes that take longest."""
    kinds: dict[str, dict[str, Any]] = defaultdict(lambda: {"milliseconds": 0.0, "share": 0.0, "calls": 0})
    shapes = []
    for event in profiler.key_averages(group_by_input_shape=True):
        own = event.self_device_time_total if case.device == "cuda" else event.self_cpu_time_total
        if not own:
            continue
        milliseconds, calls = own / 1000 / case.steps, event.count / case.steps
        kind = kinds[kind_of(event.key)]
        kind["milliseconds"] += milliseconds
        kind["calls"] += calls
        shown = [shape for shape in event.input_shapes or [] if shape]
        shapes.append({"operation": event.key, "shapes": shown[:3], "milliseconds": milliseconds, "calls": calls})
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]["milliseconds"]))
    return ordered, sorted(shapes, key=lambda row: -row["milliseconds"])[:ROWS]


def kind_of(operation: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, operation)), "other")


if __name__ == "__main__":
    main()
