"""Where a benchmark ran: what each file in results/ says beside its figures."""

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mgcc_dist.train.run_folder import provenance


def describe() -> dict[str, Any]:
    """Command, date, commit, versions, device, processor and the number of its cores that are ours."""
    facts = provenance(Accelerator())
    facts.pop("world_size")
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **facts,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
