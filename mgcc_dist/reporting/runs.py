"""Find run folders, read them, and group runs that differ only in split number and seed."""

import gc
import json
import logging
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mgcc_dist.common.config import flatten
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.identity import identity, input_keys
from mgcc_dist.evaluation.summary import REQUEST
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.reporting.image_arrays import compact
from mgcc_dist.reporting.run_configs import RunConfigs
from mgcc_dist.train.metrics_logger import read_rows
from mgcc_dist.train.saved_run import is_finished, read_result

logger = logging.getLogger(__name__)

SEED = "loop.seed"
CONTENT, CONTENT_DIGITS = "dataset_sha256", 8
MOST_SPLITS = 3
"""of a group's runs that are listed one by one"""
SURFACE_METRICS = (("hd95",), ("asd",))
REQUIRED_RESULT_KEYS = {"segment": ("method", "network", "split", "seed", "best", "last"), "ldm": ("stage",)}


@dataclass(frozen=True)
class Run:
    folder: Path
    name: str
    """path relative to the common parent of all runs of the report"""
    config: dict[str, Any]
    """content of config.yaml"""
    result: dict[str, Any]
    """content of result.json, with `ImageArrays` as images and without those of the last weights; empty for an
    unfinished run"""
    configs: RunConfigs = field(default_factory=RunConfigs, repr=False, compare=False)
    """shared by the runs of a report"""

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """rows of metrics.jsonl; a report reads those of the runs that it draws"""
        return read_rows(self.folder / "metrics.jsonl")

    @cached_property
    def summary_mark(self) -> str:
        """equal for two runs with equal mean scores"""
        summaries = [self.result["best"]["summary"], self.result["last"]["summary"]]
        return json.dumps(summaries, sort_keys=True)

    @property
    def scores_mark(self) -> str:
        """equal for two runs with equal scores"""
        images = self.result["best"].get("images")
        return self.summary_mark + (images.mark() if images else "")

    @cached_property
    def segment_config(self) -> SegmentConfig | None:
        """the config of a segmentation run; None if there is none, or this version can't read it"""
        return self.configs.check(self.folder, self.config)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """what identifies a segmentation run: all of its keys if this version can't read its config"""
        return identity(self.segment_config) if self.segment_config else flatten(self.config)

    @cached_property
    def identity_mark(self) -> str:
        """equal for two runs with the same settings, data, split and seed; "" if they are not known"""
        same = [self.identity, self.result["split"], self.result["seed"]]
        return json.dumps(same, sort_keys=True, default=str) if self.identity else ""

    @property
    def settings(self) -> dict[str, Any]:
        """the identity without seed and data"""
        others = {SEED, *input_keys(self.segment_config)} if self.segment_config else set()
        return {key: value for key, value in self.identity.items() if key not in others}

    @property
    def title(self) -> str:
        if self.result["program"] == "ldm":
            return str(self.result["stage"])
        return f"{self.result['method']}, {self.result['split']}, seed {self.result['seed']}"

    def scored(self, weights: str) -> dict[str, Any]:
        """Return the "summary" and "images" to report of a segmentation run's "best" or "last" weights.

        With a test part in the split, those of the test part, on which only the best weights are scored: none for the
        last weights. Otherwise those of validation.
        """
        if "test" in self.result["best"]:
            return self.result["best"]["test"] if weights == "best" else {}
        return self.result[weights]

    def series(self, split: str, key: str, x: str = "step") -> list[tuple[float, float]]:
        """Return (step or epoch, value) pairs of one metric of the `split` ("train", "validation") rows."""
        pairs = [(row.get(x), row.get(key)) for row in self.metrics if row.get("split") == split]
        return [(at, value) for at, value in pairs if isinstance(at, (int, float)) and isinstance(value, (int, float))]


@dataclass(frozen=True)
class RunCollection:
    segmentation: list[Run] = field(default_factory=list)
    generative: list[Run] = field(default_factory=list)
    unfinished: list[Run] = field(default_factory=list)
    galleries: list[Path] = field(default_factory=list)
    """image files of the generative stage: real, reconstructed and synthetic images"""
    damaged: list[str] = field(default_factory=list)
    """what is wrong with each folder that is left out"""

    def leave_out(self, reason: object) -> None:
        """Name a damaged folder on the log and, later, on the page."""
        self.damaged.append(str(reason))
        logger.warning("%s Left out of the report.", reason)


def find_runs(folders: Sequence[Path]) -> RunCollection:
    """Find all runs below `folders`, each once, sorted by path. Damaged ones are named and left out.

    Raises:
        UserError: a folder does not exist or holds no runs, or all of the runs are damaged.
    """
    run_folders: dict[Path, Path] = {}  # by resolved path, so a run below two of `folders` counts once
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: not a folder")
        inside = sorted({path.parent for name in ("config.yaml", "result.json") for path in folder.rglob(name)})
        if not inside and not any(folder.rglob(REQUEST)):
            raise UserError(f"{folder}: no runs found. A run folder holds a config.yaml or a result.json.")
        run_folders |= {run_folder.resolve(): run_folder for run_folder in inside}

    collection = RunCollection()
    if not run_folders:
        return collection
    configs, names = RunConfigs(), dict[str, str]()
    common = Path(os.path.commonpath([run_folder.parent for run_folder in run_folders]))
    for resolved, run_folder in run_folders.items():
        try:
            with _without_collector():
                run = _read_run(run_folder, str(resolved.relative_to(common)), configs, names)
        except UserError as error:
            collection.leave_out(error)
            continue
        if (run_folder / "autoencoder" / "config.yaml").is_file():  # the parent folder of an `ldm` run's stages
            gallery = run_folder / "gallery.png"  # written last
            if gallery.is_file():
                collection.galleries.append(gallery)
            else:
                collection.unfinished.append(run)
        elif not run.result:
            collection.unfinished.append(run)
        elif run.result["program"] == "ldm":
            collection.generative.append(run)
        else:
            collection.segmentation.append(run)
    if len(collection.damaged) == len(run_folders) and not any(any(folder.rglob(REQUEST)) for folder in folders):
        raise UserError(f"{folders[0]}: no run can be read. Repair them as the lines above say.")
    return collection


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in split number and seed."""

    runs: list[Run]
    content: str = ""
    """start of the sha256 of the data set's content, where several data sets have its name"""

    @property
    def method(self) -> str:
        """Return its name and, of runs that started from trained weights, the sha256 of these."""
        weights = {run.result["init"]["sha256"][:8] for run in self.runs if run.result.get("init")}
        return str(self.runs[0].result["method"]) + (f" (from {', '.join(sorted(weights))})" if weights else "")

    @property
    def network(self) -> str:
        """Return its name and widths and, with a pretrained encoder, the sha256 of its weights."""
        result = self.runs[0].result
        network, encoder = result["network"], result.get("encoder")
        pretrained = f" (encoder {encoder['sha256'][:8]})" if encoder else ""
        return f"{network.get('name', '')} {'-'.join(map(str, network.get('widths', ())))}{pretrained}"

    @property
    def dataset(self) -> str:
        name = str(self.runs[0].result.get("dataset", "-"))
        return f"{name} ({self.content})" if self.content else name

    @property
    def names(self) -> str:
        return format_names([run.name for run in self.runs], [self.repeats.get(run.folder, "") for run in self.runs])

    @property
    def split_kind(self) -> str:
        return split_kind(self.runs[0].result["split"])

    @property
    def distinct(self) -> list[Run]:
        """the runs without repeats"""
        return [run for run in self.runs if run.folder not in self.repeats]

    @cached_property
    def repeats(self) -> dict[Path, str]:
        return find_repeats(self.runs)

    @property
    def splits(self) -> str:
        if len(self.runs) > MOST_SPLITS:
            part = " (test part)" * ("test" in self.runs[0].result["best"])
            return f"{len(self.runs)} runs on {self.split_kind}{part}"
        return ", ".join(
            f"{run.result['split']}{' (test part)' * ('test' in run.result['best'])} seed {run.result['seed']}"
            for run in self.runs
        )

    def count(self, kind: str) -> str:
        """Return the number of "labeled", "unlabeled" or "validation" images; "*" marks synthetic ones among them."""
        images = self.runs[0].result.get("images", {})
        count = images.get(kind, "-")
        if kind == "labeled" and (pairs := images.get("synthetic_labeled")):
            return f"{count} + {pairs}*"
        synthetic = kind == "unlabeled" and count and self.runs[0].config.get("data", {}).get("synthetic")
        return f"{count}*" if synthetic else str(count)

    def score(self, weights: str, *path: str, scale: float = 100.0) -> str:
        """Return the mean over the runs of one value in `summary`, with the standard deviation for several runs.

        Surface distances also state how many of the lesions they cover. Repeated runs count once.
        """
        summaries = [run.scored(weights).get("summary", {}) for run in self.distinct]
        numbers = [scale * value for summary in summaries if (value := lookup(summary, path)) is not None]
        if not numbers:
            return "-"
        text = f"{statistics.mean(numbers):.2f}"
        if len(numbers) > 1:
            text += f" ± {statistics.stdev(numbers):.2f}"
        if path in SURFACE_METRICS and all("surfaces" in summary for summary in summaries):
            covered, lesions = (sum(summary[key] for summary in summaries) for key in ("surfaces", "lesions"))
            text += f" ({covered} of {lesions})"
        return text


def format_names(names: Sequence[str], remarks: Sequence[str] = ()) -> str:
    """Format names of runs, each with its remark, with what stands before their last slash once: `folds: a, b`."""
    parents: dict[str, list[str]] = {}
    for name, remark in zip_longest(names, remarks, fillvalue=""):
        parent, _, last = name.rpartition("/")
        parents.setdefault(parent, []).append(last + remark)
    return "; ".join(
        f"{parent}{': ' if len(last) > 1 else '/'}" * bool(parent) + ", ".join(last) for parent, last in parents.items()
    )


def split_kind(name: str) -> str:
    """Return the name of a split without its number: `busi_fold_1` and `busi_fold_2` are splits of one kind."""
    return re.sub(r"_\d+$", "", name)


def find_repeats(runs: Sequence[Run]) -> dict[Path, str]:
    """Return the folders of runs that repeat an earlier one of `runs`, each with a remark that says which.

    Such runs are no independent samples: their scores are equal, or they have the same settings, split and seed.
    """
    repeats: dict[Path, str] = {}
    first: dict[str, Run] = {}
    summaries = Counter(run.summary_mark for run in runs)
    for run in runs:
        marks = {run.scores_mark: "identical to"} if summaries[run.summary_mark] > 1 else {}
        if run.identity_mark:
            marks[run.identity_mark] = "same settings and seed as"
        remark = next((f" ({words} {first[mark].name})" for mark, words in marks.items() if mark in first), None)
        if remark:
            repeats[run.folder] = remark
        for mark in marks:
            first.setdefault(mark, run)
    return repeats


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Group runs by settings, data and precision; `busi_random_1` and `busi_random_2` are splits of one kind.

    Data sets of one name but with different content are different ones. Runs of 0.1, which have no hash of the content,
    are taken to be of the data set that has their name, if there is only one.
    """
    groups: dict[str, RunGroup] = {}
    contents: dict[str, set[str]] = {}
    for run in runs:
        contents.setdefault(run.result.get("dataset", "-"), set()).update(filter(None, [run.result.get(CONTENT)]))
    for run in runs:
        keys = ["dataset", "images", "world_size", "precision"]
        keys += [] if run.segment_config else ["method", "network"]
        facts = {key: run.result.get(key) for key in keys}
        facts["encoder"] = (run.result.get("encoder") or {}).get("sha256")
        images = run.result.get("images") or {}
        if "test" in images:  # folds are not of exactly one size
            facts["images"] = sorted(images)
        kind = split_kind(run.result["split"])
        same_name = contents[run.result.get("dataset", "-")]
        content = run.result.get(CONTENT, "unknown")[:CONTENT_DIGITS] if len(same_name) > 1 else ""
        group = groups.setdefault(
            json.dumps([kind, facts, content, run.settings], sort_keys=True, default=str), RunGroup([], content)
        )
        group.runs.append(run)
    return list(groups.values())


@contextmanager
def _without_collector() -> Iterator[None]:
    """Do not search for cycles, of which JSON has none: this is a seventh of the time to read results."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_run(folder: Path, name: str, configs: RunConfigs, names: dict[str, str]) -> Run:
    config = configs.read(folder / "config.yaml")
    result = read_result(folder) if is_finished(folder) else {}
    if is_finished(folder):
        valid = _is_result(result)
        try:
            if valid and result["program"] == "segment":
                compact(result, names)
        except (AttributeError, KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise UserError(f"{folder / 'result.json'}: not the result of a run. Move it elsewhere and rerun the run.")
    return Run(folder, name, config, result, configs)


def _is_result(result: dict[str, Any]) -> bool:
    required = REQUIRED_RESULT_KEYS.get(str(result.get("program")))
    if required is None or not all(key in result for key in required):
        return False
    if result["program"] == "ldm":
        return True
    best = result["best"]
    external = best.get("external", {})
    if not isinstance(external, dict) or not all(isinstance(result[key], str) for key in ("method", "split")):
        return False
    return isinstance(result["network"], dict) and all(
        isinstance(scored, dict) and isinstance(scored.get("summary"), dict)
        for scored in (best, result["last"], best.get("test", best), *external.values())
    )


def lookup(tree: Any, path: Sequence[str]) -> float | None:
    """Return the value at a path of keys in nested dictionaries, or None if a key is missing."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
