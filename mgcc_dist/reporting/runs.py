"""Run folders as a report needs them: found, read, and grouped over splits and seeds."""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgcc_dist.errors import UserError
from mgcc_dist.train.journal import read_rows
from mgcc_dist.train.run_folder import is_finished, read_result


@dataclass(frozen=True)
class Run:
    folder: Path
    result: dict[str, Any]
    """content of result.json"""
    rows: list[dict[str, Any]]
    """content of metrics.jsonl"""

    @property
    def title(self) -> str:
        if self.result["program"] == "ldm":
            return str(self.result["stage"])
        return f"{self.result['method']}, {self.result['split']}, seed {self.result['seed']}"


@dataclass(frozen=True)
class Found:
    segmentation: list[Run]
    generative: list[Run]
    unfinished: list[Path]
    """folders with a config.yaml but no result.json"""
    galleries: list[Path]
    """pictures of the generative stage: real, reconstructed, synthetic"""


def find(folders: Sequence[Path]) -> Found:
    """All runs under `folders`, at any depth, in the order of their paths.

    Raises:
        UserError: a folder is not there or holds no run; a result.json is damaged or of no run.
    """
    found = Found([], [], [], [])
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
        configs = sorted(folder.rglob("config.yaml"))
        if not configs:
            raise UserError(f"there is no run under {folder}: no folder in it has a config.yaml")
        for run in (path.parent for path in configs):
            if (run / "autoencoder" / "config.yaml").is_file():  # the folder of a whole generative stage, not a run
                if (run / "gallery.png").is_file():
                    found.galleries.append(run / "gallery.png")
            elif is_finished(run):
                read = _read(run)
                (found.generative if read.result["program"] == "ldm" else found.segmentation).append(read)
            else:
                found.unfinished.append(run)
    return found


@dataclass(frozen=True)
class Group:
    """Runs that differ only in split number and seed."""

    runs: list[Run]

    @property
    def method(self) -> str:
        return str(self.runs[0].result["method"])

    @property
    def network(self) -> str:
        network = self.runs[0].result["network"]
        return f"{network['name']} {network['widths'][0]}-{network['widths'][-1]}"

    @property
    def data(self) -> str:
        images = self.runs[0].result["images"]
        return f"{self.runs[0].result['dataset']}: {images['labeled']} labeled, {images['unlabeled']} unlabeled"

    @property
    def splits(self) -> str:
        return ", ".join(f"{run.result['split']} (seed {run.result['seed']})" for run in self.runs)

    def score(self, weights: str, *path: str, scale: float = 100.0) -> str:
        """Mean over the runs of a number in `summary`, with the standard deviation where there are several."""
        values = [_at(run.result[weights]["summary"], path) for run in self.runs]
        numbers = [scale * value for value in values if value is not None]
        if not numbers:
            return "-"
        mean = f"{statistics.mean(numbers):.2f}"
        return f"{mean} ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else mean


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs by method, network and data; `busi_random_1` and `busi_random_2` are splits of one kind."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        kind = re.sub(r"_\d+$", "", run.result["split"])
        same = [run.result[key] for key in ("method", "network", "dataset", "images", "steps")]
        groups.setdefault(json.dumps([*same, kind]), []).append(run)
    return [Group(members) for members in groups.values()]


def _read(folder: Path) -> Run:
    result = read_result(folder)
    needed = {"segment": ("method", "network", "images", "best", "last"), "ldm": ("stage",)}
    missing = [key for key in ("program", *needed.get(result.get("program", ""), ())) if key not in result]
    if missing or result["program"] not in needed:
        raise UserError(f"{folder / 'result.json'} is not the result of a run of mgcc_dist (no {missing or 'program'})")
    return Run(folder, result, read_rows(folder / "metrics.jsonl"))


def _at(tree: Any, path: Sequence[str]) -> float | None:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
