"""Where the time of one MGCC training step goes, by kind of operation, from torch's profiler.

    python -m benchmarks.profile_step --out benchmarks/results/profile_step-cpu.json
    python -m benchmarks.profile_step --paper --settings channels_last bf16 --out FILE

The step is that of benchmarks.train_step with `--settings` (default: channels_last, as `segment` trains). Times are of
the device: on a GPU the kernels that an operation launches, on a CPU the operation without the operations it calls.
`outside operations` is the rest of the step's duration: Python, autograd's bookkeeping, the profiler, and on a GPU idle
time. `milliseconds_per_step` is timed without the profiler.
"""

import argparse
import re
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.step import SETTINGS, StepConfig, package_step
from benchmarks.train_step import add_size_options, enabled, step_config, synchronize
from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.files import write_json

# An operation is of the first kind whose pattern matches its name.
KINDS = {
    "convolution, backward": r"conv\w*_backward|dgrad|wgrad|bgrad",
    "convolution, forward": r"conv|implicit_gemm|xmma|cutlass",
    "batch norm, backward": r"batch_norm\w*backward|bn_bw",
    "batch norm, forward": r"batch_norm|bn_fw",
    "ReLU, GELU and sigmoid": r"relu|clamp_min|threshold|gelu|sigmoid",
    "upsampling": r"upsampl",
    "concatenation and slicing": r"aten::(cat|slice|narrow|split|select|as_strided)|CatArray",
    "copies and layouts": r"copy|_to_copy|clone|contiguous|Memcpy|transpose",
    "perturbations": r"bernoulli|rand|uniform|amax|aten::lt",
    "optimizer": r"foreach|_fused|Optimizer|multi_tensor",
    "elementwise, sums": r"aten::(add|mul|div|sub|sum|mean|neg|pow|fill|zero)_?|elementwise|reduce_kernel",
}
WARM_UP_STEPS = 2
LISTED = 20
KERNELS_LISTED = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--trace", type=Path, help="also write the timeline, for Chrome's or Perfetto's viewer")
    add_size_options(parser)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, and then as many profiled ones (default: 3)")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=["channels_last"])
    options = parser.parse_args()
    config = step_config(options, options.steps)
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    step, facts = package_step(enabled(options.settings), config)
    for number in range(WARM_UP_STEPS):
        step(number)
    synchronize(config)

    def milliseconds_per_step(first: int) -> float:
        started = time.perf_counter()
        for number in range(first, first + config.steps):
            step(number)
        synchronize(config)
        return 1000 * (time.perf_counter() - started) / config.steps

    timed = milliseconds_per_step(WARM_UP_STEPS)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if config.device == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        profiled = milliseconds_per_step(WARM_UP_STEPS + config.steps)
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))

    rows, heaviest, kernels = summarize(profiler, config)
    operations = sum(row["milliseconds"] for row in rows.values())
    if kernels:  # replayed by a CUDA graph, or launched outside PyTorch's operations
        unknown = sum(kernel["milliseconds"] for kernel in kernels) - operations
        rows["kernels outside operations"] = {"milliseconds": max(0.0, unknown), "calls": 0}
        operations += max(0.0, unknown)
    rows["outside operations"] = {"milliseconds": profiled - operations, "calls": 0}
    for row in (*rows.values(), *heaviest, *kernels):
        row["share"] = round(row["milliseconds"] / profiled, 4)
        row["milliseconds"] = round(row["milliseconds"], 3)
    content = {
        **benchmark_header("benchmarks.profile_step"),
        "case": asdict(config),
        "settings": options.settings,
        **facts,
        "milliseconds_per_step": round(timed, 1),
        "profiled_milliseconds_per_step": round(profiled, 1),
        "rows": rows,
        "heaviest": heaviest,
    }
    if kernels:
        launches = sum(kernel["calls"] for kernel in kernels)
        content |= {"kernel_launches_per_step": launches, "kernels": kernels[:KERNELS_LISTED]}
    write_json(options.out, content)
    for kind, row in rows.items():
        print(f"{kind:26} {row['milliseconds']:10.1f} ms {100 * row['share']:6.1f} %  {row['calls']:6g} calls per step")
    print(f"profile_step: {timed:.1f} ms per step -> {options.out}")


def summarize(
    profiler: profile, config: StepConfig
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return milliseconds and calls per step: by kind; of the LISTED heaviest operations and shapes; of GPU kernels.

    All are sorted by time, longest first.
    """
    cuda = config.device == "cuda"

    def times(event: Any) -> dict[str, Any]:
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        return {"milliseconds": own / 1000 / config.steps, "calls": event.count / config.steps}

    kinds: dict[str, dict[str, Any]] = defaultdict(lambda: {"milliseconds": 0.0, "calls": 0})
    operations = []
    for event in profiler.key_averages(group_by_input_shape=True):
        # Kernels are events too, and their time is also that of the operation that launched them.
        if event.device_type != DeviceType.CPU or not (measured := times(event))["milliseconds"]:
            continue
        kind = kinds[kind_of(event.key)]
        for key in measured:
            kind[key] += measured[key]
        shapes = [shape for shape in event.input_shapes or [] if shape]
        operations.append({"operation": event.key, "shapes": shapes[:3], **measured})
    kernels = [{"kernel": event.key[:160], **times(event)} for event in profiler.key_averages() if is_kernel(event)]
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]["milliseconds"]))
    for rows in (operations, kernels):
        rows.sort(key=lambda row: -row["milliseconds"])
    return ordered, operations[:LISTED], kernels


def is_kernel(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def kind_of(operation: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, operation)), "other")


if __name__ == "__main__":
    main()
