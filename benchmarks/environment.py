"""What a machine offers, and whether everything that the benchmarks run can be imported.

    python -m benchmarks.environment --out environment.json --modules mgcc_dist.segment benchmarks.train_step

Exits with status 1 if a module cannot be imported.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mgcc_dist.common.environment import benchmark_header, describe_environment
from mgcc_dist.common.errors import reason_of
from mgcc_dist.common.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--modules", nargs="*", default=[], help="modules to import")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    content = {**benchmark_header("benchmarks.environment", device), "environment": describe_environment(device)}
    rows: dict[str, Any] = {"first matrix product": {"seconds": round(first_product(device), 3)}}
    if device.type == "cuda":
        rows["gpu"] = gpu_properties(device)
    failures = {}
    for name in options.modules:
        started = time.perf_counter()
        try:
            importlib.import_module(name)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {reason_of(error)}"
            print(f"environment: {name} cannot be imported: {failures[name]}")
        else:
            rows[f"import {name}"] = {"seconds": round(time.perf_counter() - started, 3)}
    write_json(options.out, {**content, "rows": rows, "not_importable": failures})
    print(f"environment: {content['device']}, torch {content['versions']['torch']} -> {options.out}")
    sys.exit(1 if failures else 0)


def first_product(device: torch.device) -> float:
    """Return the seconds until a first matrix product is on the host, which includes CUDA's initialisation."""
    started = time.perf_counter()
    x = torch.randn(64, 64, device=device)
    (x @ x).sum().item()
    return time.perf_counter() - started


def gpu_properties(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory >> 20,
        "l2_cache_mib": properties.L2_cache_size >> 20,
    }


if __name__ == "__main__":
    main()
