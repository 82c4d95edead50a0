"""Compare two run folders: the same rows and the same weights, bit for bit."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mgcc_dist.train.metrics_logger import read_rows
from mgcc_dist.train.step_times import TIMED_KEYS


def losses(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what was timed."""
    rows = read_rows(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMED_KEYS} for row in rows]


def assert_same_run(run: Path, expected: Path) -> None:
    assert losses(run) == losses(expected)
    for which in ("best", "last"):
        weights = load_file(run / which / "model.safetensors")
        others = load_file(expected / which / "model.safetensors")
        assert weights.keys() == others.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, others[name]), name
