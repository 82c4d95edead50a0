"""Ranks that are slower than the others. This file does not import torch.

All ranks take the same time per step, because the fast ones wait for the slow ones when gradients are averaged. So
ranks are compared by what they do before that: they wait for data, and run the forward pass.
"""

import heapq
import statistics
from collections.abc import Sequence
from typing import Any

COUNT = 5
"""slowest ranks that are named"""
SLOW = 1.5
"""times the median from which a rank counts as slow,"""
SLOW_SHARE = 0.1
"""if the difference is also this share of the step"""
NAMED = 1.1
"""times the median of the complete run from which the last lines of its log name a rank; less is noise"""


def slowest_ranks(by_rank: Sequence[Sequence[float]], step_seconds: float) -> dict[str, Any]:
    """Return the COUNT slowest ranks and the median, for `stragglers` in metrics.jsonl.

    Args:
        by_rank: for each rank, seconds per step waiting for data and in the forward pass.
        step_seconds: of all ranks.
    """
    totals = [sum(seconds) for seconds in by_rank]
    return {
        "step_seconds": round(step_seconds, 6),
        "median_seconds": round(statistics.median_low(totals), 6),
        "slowest": [
            {"rank": rank, "seconds": round(totals[rank], 6), "data_seconds": round(by_rank[rank][0], 6)}
            for rank in heapq.nlargest(COUNT, range(len(totals)), totals.__getitem__)
        ],
    }


def slow_rank(stragglers: dict[str, Any]) -> dict[str, Any] | None:
    """Return the slowest rank if the others wait for it for a good part of the step."""
    slowest, median = stragglers["slowest"][0], stragglers["median_seconds"]
    waited = slowest["seconds"] - median
    return slowest if waited > max((SLOW - 1) * median, SLOW_SHARE * stragglers["step_seconds"]) else None


def named_ranks(stragglers: dict[str, Any]) -> list[dict[str, Any]]:
    """Return those of the slowest ranks that differ from the median by more than noise."""
    return [rank for rank in stragglers["slowest"] if rank["seconds"] > NAMED * stragglers["median_seconds"]]


def describe_rank(rank: dict[str, Any], median: float) -> str:
    """Format `rank 3 (n2) needs 0.81 s per step for data (0.3 s) and forward pass, the median is 0.42 s`."""
    host = f" ({rank['host']})" if rank.get("host") else ""
    return (
        f"rank {rank['rank']}{host} needs {rank['seconds']:.3g} s per step for data ({rank['data_seconds']:.3g} s) and "
        f"forward pass, the median is {median:.3g} s"
    )
