"""Benchmark the fused kernels against PyTorch, and write the table that `fuse(model, "auto")` reads.

    mgcc bench --json FILE --png FILE        results and a plot of them
    mgcc bench --write-table [FILE]          also write this device's rows of measured.json
    mgcc bench --op upconv --quick           one operation, briefly
    mgcc bench --import my_kernel.py         the operations of a plugin, too

On a GPU: the paper's shapes in bfloat16 (--dtypes). Plain PyTorch in both memory layouts, with cudnn.benchmark, is
compared with every fused implementation and then, while time remains, with torch.compile (default, max-autotune, forced
layout). Timers: CUDA events with a flushed L2 cache (Triton's do_bench), and replay of a CUDA graph on alternating
inputs (cold) and on one input (warm). Without a GPU: the phase up-convolution, layouts and bfloat16, with the shapes of
the paper and of small networks. Triton, torch.compile, launches and peak memory are not measured on a CPU.

All implementations are timed in alternation. Roofline shares are relative to the copy bandwidth and arithmetic peak
measured at the start. --quick uses fewer shapes (on a GPU one per operation), shorter rounds and no torch.compile;
--no-compile only skips torch.compile. No new workload starts after --seconds; what was skipped is listed. torch.compile
is measured last, so it is skipped first. Results and table are written after each workload, so a benchmark that is
killed loses at most one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mgcc_dist.common.components import load_installed_plugins, take_imports
from mgcc_dist.common.errors import run_program
from mgcc_dist.kernels import TABLE_PATH


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line first; torch, which takes seconds to import, follows."""
    parser = _parser()
    options = parser.parse_args(take_imports(sys.argv[1:] if argv is None else argv))
    load_installed_plugins()
    from mgcc_dist.bench.run import run
    from mgcc_dist.kernels.operation import specs

    if options.op not in (None, *specs()):
        parser.error(f"--op {options.op}: unknown operation. Choose one of {', '.join(specs())}.")
    run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mgcc bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--op", metavar="NAME", help="measure only this operation, such as upconv, msag or mixer")
    parser.add_argument("--import", metavar="MODULE", help="import a module or file that registers kernels; repeatable")
    parser.add_argument("--json", "--out", type=Path, metavar="FILE", help="write all results to FILE")
    parser.add_argument("--png", type=Path, metavar="FILE", help="plot speedups and roofline shares to FILE")
    parser.add_argument(
        "--write-table",
        nargs="?",
        type=Path,
        const=TABLE_PATH,
        metavar="FILE",
        help=f"replace this device's rows of FILE (default: {TABLE_PATH.name})",
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter rounds, no torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--seconds", type=float, default=240, help="start no workload after this time (default: 240)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "float16", "bfloat16"),
        help="dtypes to measure (default: bfloat16; on a CPU float32, and bfloat16 if native)",
    )
    return parser


if __name__ == "__main__":
    run_program("bench", main)
