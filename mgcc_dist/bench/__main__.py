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

from mgcc_dist.bench.config import BenchConfig
from mgcc_dist.common.components import load_installed_plugins
from mgcc_dist.common.errors import UserError, did_you_mean, run_program
from mgcc_dist.common.program import Command, Program


def run(config: BenchConfig) -> None:
    """Measure, and write what the options ask for."""
    load_installed_plugins()
    from mgcc_dist.bench.run import run_benchmark
    from mgcc_dist.kernels.operation import specs

    if config.op and config.op not in specs():
        hint = did_you_mean(config.op, specs()) or f" Choose one of {', '.join(specs())}."
        raise UserError(f"--op {config.op}: unknown operation.{hint}")
    run_benchmark(config)


PROGRAM = Program("bench", __doc__, Command(BenchConfig, run, "benchmark the kernels on this device", __doc__))
main = PROGRAM.main

if __name__ == "__main__":
    run_program("bench", main)
