"""Compile the Triton kernels of the kernel benchmark on all CPU cores, into Triton's cache.

    python -m benchmarks.precompile --out precompile.json

Triton compiles a kernel at its first launch, one after another, while the GPU waits. This runs the package's own
launchers on small CPU tensors, with every launch replaced by its compilation for the GPU, so a process that launches
the kernels later finds them in the cache. A compiled kernel depends on channels, dtypes and on which integers are
multiples of 16, not on the number of pixels.
"""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mgcc_dist.bench.workloads import workloads
from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.errors import reason_of
from mgcc_dist.common.files import write_json
from mgcc_dist.kernels import targets
from mgcc_dist.kernels.operation import Workload

SIDE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--target", help=f"{', '.join(targets.TARGETS)} (default: this machine's GPU)")
    parser.add_argument("--ops", nargs="+", help="operations of the kernel benchmark (default: all)")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="(default: one per core)")
    options = parser.parse_args()
    header = benchmark_header("benchmarks.precompile")
    target = options.target or targets.device_target(torch.device("cuda"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the processes, which compile only
    os.environ["OMP_NUM_THREADS"] = "1"
    dtypes = [getattr(torch, name) for name in options.dtypes]
    rows: dict[str, Any] = {}
    write_json(options.out, {**header, "target": target, "rows": rows})
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        workloads = [each for each in small_workloads(dtypes) if not options.ops or each.op in options.ops]
        futures = {pool.submit(compile_workload, each, target): each.name for each in workloads}
        for future in as_completed(futures):
            name = futures[future]
            try:
                rows[name] = future.result()
            except Exception as error:  # the kernel benchmark will report it again
                rows[name] = {"not_run": f"{type(error).__name__}: {reason_of(error)}"}
            print(f"{name}: {rows[name]}", flush=True)
            write_json(options.out, {**header, "target": target, "rows": rows})
    print(f"precompile: {options.out}")


def small_workloads(dtypes: list[torch.dtype]) -> list[Workload]:
    """Return the workloads of the kernel benchmark on planes of SIDE x SIDE, without those that then are the same."""
    listed = workloads("cuda", dtypes, quick=False)
    small = (replace(each, shape=(each.shape[0], SIDE, SIDE, *each.shape[3:])) for each in listed)
    return list(dict.fromkeys(small))


def compile_workload(workload: Workload, target: str) -> dict[str, Any]:
    """Compile the kernels that `workload` launches, in a process that has not imported the kernels yet.

    Returns:
        The number of kernels, and the seconds this took.
    """
    from triton.runtime import driver, jit

    started = time.perf_counter()
    launch = jit.JITFunction.run
    kernels = set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernels.add(kernel.hash)
        return kernel

    driver.set_active(CompilingDriver(target))
    with (
        mock.patch.object(jit.JITFunction, "run", compile_only),
        mock.patch.object(targets, "device_target", return_value=target),
        mock.patch.object(targets, "unsupported_device_reason", return_value=None),
    ):
        # Imports the kernels, which take both functions from `targets` by name.
        from mgcc_dist.bench.variants import Runner, plain_and_fused

        cpu = torch.device("cpu")
        variants, _ = plain_and_fused(workload, cpu, triton=True)
        for variant in variants:
            if variant.implementation.startswith("triton"):
                runner = Runner(variant.module, workload.inputs(1, variant.layout, cpu), workload)
                runner.both(0) if workload.training else runner.forward(0)
    return {"kernels": len(kernels), "seconds": round(time.perf_counter() - started, 1)}


class CompilingDriver:
    """Stands in for Triton's driver of a GPU."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


if __name__ == "__main__":
    main()
