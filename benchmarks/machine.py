"""Where a benchmark ran: what each file in results/ says beside its figures."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mgcc_dist.common.environment import facts


def describe() -> dict[str, Any]:
    """Command, date, commit, versions, device, processor (model, vectors) and the number of its cores that are ours."""
    here = facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **{key: here[key] for key in ("versions", "commit", "device", "processor", "cores")},
        "vectors": torch.backends.cpu.get_cpu_capability(),  # AVX2 or AVX512: a CPU's ratios depend on it
    }
