"""Times of the fused forms beside those of PyTorch, and the table by which `fuse(model, "auto")` chooses.

    python -m mgcc_dist.kernels.bench --json FILE --png FILE        figures and a picture of them
    python -m mgcc_dist.kernels.bench --write-table [FILE]          also write this device's rows of measured.json
    python -m mgcc_dist.kernels.bench --op upconv --quick           one operation, briefly

On a GPU: the paper's shapes in bfloat16 (--dtypes), eager in both layouts with cudnn.benchmark against every fused
form, and then, as long as the time lasts, torch.compile (default, max-autotune, layouts forced). By CUDA events with
the L2 cache flushed (Triton's do_bench), and by replay of a CUDA graph with inputs in turn (cold) and with one input
(warm). Without a GPU: the up-convolution by phases, layouts and bfloat16, of the paper's shapes and of small networks;
Triton's forms, torch.compile, launches and peak memory are not measured there.

Candidates take turns. Roofline shares are of copy bandwidth and arithmetic peak measured at the start. --quick
takes fewer shapes (on a GPU one per operation) in shorter turns and leaves out torch.compile; --no-compile does only
the latter. After --seconds no further workload begins; what is left out is listed, torch.compile last measured and so
first left out. Results and table are written after each workload, so a benchmark that is killed loses at most one.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mgcc_dist.common import environment
from mgcc_dist.common.files import write_json
from mgcc_dist.kernels.bench import workloads
from mgcc_dist.kernels.bench.candidates import COMPILE, compiled, eager_and_fused
from mgcc_dist.kernels.bench.measure import Effort, Measured, as_row, measure, merge, table_rows
from mgcc_dist.kernels.bench.roofline import Roofline, fastest_library
from mgcc_dist.kernels.bench.table import write_table
from mgcc_dist.kernels.bench.workloads import Workload
from mgcc_dist.kernels.measured import TABLE, device_name


def main(words: list[str] | None = None) -> None:
    options = _options(words)
    if options.png:
        from mgcc_dist.kernels.bench import picture  # before minutes of work, as matplotlib may not be installed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("bench: no GPU here: the CPU's rows alone; no Triton, torch.compile, launches or peak memory")
    dtypes = [getattr(torch, name) for name in options.dtypes or _default_dtypes(device)]
    effort = _effort(device, options.quick)
    deadline = time.monotonic() + options.seconds
    # At the start, because files that change while it runs are not what runs.
    where = environment.benchmark_header("mgcc_dist.kernels.bench", device)
    with fastest_library():
        roofline = Roofline(device, dtypes, effort.milliseconds)
        print(f"bench: {device_name(device)}, {roofline.as_dict()}", flush=True)
        make = workloads.on_gpu if device.type == "cuda" else workloads.on_cpu
        chosen = [each for each in make(dtypes, options.quick) if options.op in (None, each.op)]
        rows: dict[str, Any] = {}

        def save(measured: Measured) -> None:
            rows[measured.workload.name] = as_row(measured, roofline)
            if options.json:
                write_json(options.json, {**where, "roofline": roofline.as_dict(), "rows": rows, "not_run": {}})
            if options.write_table:
                write_table(options.write_table, table_rows(measured), device_name(device), where)

        done, not_run = _measure_all(chosen, device, effort, deadline, save)
        if device.type == "cuda" and not (options.quick or options.no_compile):
            not_run |= _compile_all(done, device, effort, deadline, save)
    content = {**where, "roofline": roofline.as_dict(), "rows": rows, "not_run": not_run}
    print("\n".join(_summary(rows)), *(f"not run: {name}: {why}" for name, why in not_run.items()), sep="\n")
    if options.json:
        write_json(options.json, content)
        print(f"bench: {options.json}")
    if options.png:
        picture.draw(content, options.png)
        print(f"bench: {options.png}")
    if options.write_table:
        print(f"bench: {options.write_table}")


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m mgcc_dist.kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=workloads.OPERATIONS, help="this operation alone")
    parser.add_argument("--json", "--out", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw ratios and roofline shares there")
    parser.add_argument(
        "--write-table",
        nargs="?",
        type=Path,
        const=TABLE,
        metavar="FILE",
        help=f"replace this device's rows of FILE (default: {TABLE.name})",
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter turns, no torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--seconds", type=float, default=240, help="no workload begins later than this (240)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "float16", "bfloat16"), help="(bfloat16; on a CPU also float32)"
    )
    return parser.parse_args(words)


def _default_dtypes(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return ["bfloat16"]
    return ["float32", "bfloat16"] if environment.has_bf16(device) else ["float32"]


def _effort(device: torch.device, quick: bool) -> Effort:
    if device.type == "cuda":
        return Effort(3, 10 if quick else 20)
    return Effort(5 if quick else 11, 20 if quick else 60)


LATE = "the time was over; give more --seconds"


def _measure_all(
    chosen: list[Workload],
    device: torch.device,
    effort: Effort,
    deadline: float,
    save: Callable[[Measured], None],
) -> tuple[dict[str, Measured], dict[str, str]]:
    """By the workload's name what was measured, and why what was not."""
    done, not_run = dict[str, Measured](), dict[str, str]()
    for workload in chosen:
        if time.monotonic() > deadline:
            not_run[workload.name] = LATE
            continue
        candidates, refused = eager_and_fused(workload, device, triton=device.type == "cuda")
        done[workload.name] = measure(workload, candidates, device, effort)
        done[workload.name].not_run |= refused
        save(done[workload.name])
        print(f"bench: {workload.name}", flush=True)
    return done, not_run


def _compile_all(
    done: dict[str, Measured],
    device: torch.device,
    effort: Effort,
    deadline: float,
    save: Callable[[Measured], None],
) -> dict[str, str]:
    """Adds torch.compile to what was measured; what there was no time for."""
    not_run = {}
    for name, measured in done.items():
        if time.monotonic() > deadline:
            not_run[f"{COMPILE} {name}"] = LATE
            continue
        merge(measured, measure(measured.workload, compiled(measured.workload, device), device, effort))
        save(measured)
        print(f"bench: {COMPILE} {name}", flush=True)
    return not_run


def _summary(rows: dict[str, Any]) -> list[str]:
    """A line a workload, direction and candidate, by the first clock."""
    lines = []
    for name, row in rows.items():
        for direction in row["floor_ms"]:
            for candidate, by_clock in row[direction].items():
                for found in list(by_clock.values())[:1]:
                    share, ratio = found["roofline_share"], found.get("ratio_to_best_plain", "")
                    figures = f"{found['ms']:10.4f} ms {share:7.1%} of roofline {ratio:6} x"
                    lines.append(f"{name:50} {direction:8} {candidate:36} {figures}")
    return lines


if __name__ == "__main__":
    main()
