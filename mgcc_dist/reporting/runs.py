"""Run folders as a report needs them: found, read, and grouped over splits and seeds."""

import copy
import json
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mgcc_dist.common.errors import UserError
from mgcc_dist.train.metrics_logger import read_rows
from mgcc_dist.train.run_folder import is_finished, read_result

# Settings that runs in one row may differ in: split and seed, and what changes nothing about how a run ends.
FREE = (
    *("out", "data.split", "data.shards", "data.synthetic", "data.workers"),
    *("loop.seed", "loop.log_every", "loop.checkpoint_every", "loop.keep_checkpoints"),
)
NEEDED = {"segment": ("method", "network", "split", "seed", "best", "last"), "ldm": ("stage",)}


@dataclass(frozen=True)
class Run:
    folder: Path
    name: str
    """the folder, without what all the runs of a report have in common"""
    config: dict[str, Any]
    """content of config.yaml"""
    rows: list[dict[str, Any]]
    """content of metrics.jsonl"""
    result: dict[str, Any]
    """content of result.json; empty for a run that is not finished"""

    @property
    def title(self) -> str:
        if self.result["program"] == "ldm":
            return str(self.result["stage"])
        return f"{self.result['method']}, {self.result['split']}, seed {self.result['seed']}"

    def points(self, split: str, key: str, along: str = "step") -> list[tuple[float, float]]:
        """(step or epoch, value) of a number in the `split` ("train", "validation") rows that have it."""
        return [(row[along], row[key]) for row in self.rows if row.get("split") == split and key in row]


@dataclass(frozen=True)
class Found:
    segmentation: list[Run] = field(default_factory=list)
    generative: list[Run] = field(default_factory=list)
    unfinished: list[Run] = field(default_factory=list)
    galleries: list[Path] = field(default_factory=list)
    """pictures of the generative stage: real, reconstructed, synthetic"""


def find(folders: Sequence[Path]) -> Found:
    """All runs under `folders`, at any depth, each once, in the order of their paths.

    Raises:
        UserError: a folder is not there or holds no run; a config.yaml or result.json is damaged or of no run.
    """
    places: dict[Path, Path] = {}  # by what they resolve to: a run under two of `folders` counts once
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
        inside = sorted({path.parent for name in ("config.yaml", "result.json") for path in folder.rglob(name)})
        if not inside:
            raise UserError(f"there is no run under {folder}: no folder in it has a config.yaml or result.json")
        places |= {place.resolve(): place for place in inside}

    found = Found()
    common = Path(os.path.commonpath([place.parent for place in places]))
    for resolved, place in places.items():
        run = _read(place, str(resolved.relative_to(common)))
        if (place / "autoencoder" / "config.yaml").is_file():  # the folder of a whole generative stage, not a run
            gallery = place / "gallery.png"  # drawn last
            if gallery.is_file():
                found.galleries.append(gallery)
            else:
                found.unfinished.append(run)
        elif not run.result:
            found.unfinished.append(run)
        else:
            (found.generative if run.result["program"] == "ldm" else found.segmentation).append(run)
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
        return f"{network.get('name', '')} {'-'.join(map(str, network.get('widths', ())))}"

    @property
    def dataset(self) -> str:
        return str(self.runs[0].result.get("dataset", "-"))

    @property
    def names(self) -> str:
        return ", ".join(run.name for run in self.runs)

    @property
    def splits(self) -> str:
        return ", ".join(f"{run.result['split']} seed {run.result['seed']}" for run in self.runs)

    def count(self, kind: str) -> str:
        """How many "labeled", "unlabeled" or "validation" images; a star where synthetic ones are among them."""
        count = self.runs[0].result.get("images", {}).get(kind, "-")
        synthetic = kind == "unlabeled" and count and self.runs[0].config.get("data", {}).get("synthetic")
        return f"{count}*" if synthetic else str(count)

    def score(self, weights: str, *path: str, scale: float = 100.0) -> str:
        """Mean over the runs of a number in `summary`, with the standard deviation where there are several."""
        values = [at(run.result[weights]["summary"], path) for run in self.runs]
        numbers = [scale * value for value in values if value is not None]
        if not numbers:
            return "-"
        mean = f"{statistics.mean(numbers):.2f}"
        return f"{mean} ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else mean


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs by all that they are made of; `busi_random_1` and `busi_random_2` are splits of one kind."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        config = copy.deepcopy(run.config)
        for path in FREE:
            section, _, key = path.rpartition(".")
            (config.get(section, {}) if section else config).pop(key, None)
        facts = {
            key: run.result.get(key) for key in ("method", "network", "dataset", "images", "world_size", "precision")
        }
        kind = re.sub(r"_\d+$", "", run.result["split"])
        groups.setdefault(json.dumps([kind, facts, config], sort_keys=True, default=str), []).append(run)
    return [Group(members) for members in groups.values()]


def _read(folder: Path, name: str) -> Run:
    config: Any = {}
    if (folder / "config.yaml").is_file():
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{folder / 'config.yaml'} is damaged ({' '.join(str(error).split())})") from error
        if not isinstance(config, dict):
            raise UserError(f"{folder / 'config.yaml'} is not the config of a run")
    result = read_result(folder) if is_finished(folder) else {}
    if is_finished(folder) and not _is_result(result):
        raise UserError(f"{folder / 'result.json'} is not the result of a run of mgcc_dist")
    return Run(folder, name, config, read_rows(folder / "metrics.jsonl"), result)


def _is_result(result: Any) -> bool:
    if not isinstance(result, dict) or not all(key in result for key in NEEDED.get(result.get("program", ""), ("",))):
        return False
    if result["program"] == "ldm":
        return True
    scored = [result[weights] for weights in ("best", "last")]
    return all(isinstance(each, dict) and isinstance(each.get("summary"), dict) for each in scored)


def at(tree: Any, path: Sequence[str]) -> float | None:
    """The number in nested dictionaries at a path of keys; None where the path ends early."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
