"""Scores of single images: from a run's result.json, and from the folders of `mgcc evaluate`; means with intervals.

Every table with intervals is computed here, from rows as in images.csv and by `evaluation/summary.py`, wherever the
scores come from.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_versioned
from mgcc_dist.data.sample import STRETCHED
from mgcc_dist.evaluation.statistics import Interval
from mgcc_dist.evaluation.summary import FORMAT, IMAGES, METRICS, NAMES, REQUEST, SUMMARY, VERSION, Row, average
from mgcc_dist.evaluation.threshold import DEFAULT
from mgcc_dist.reporting.image_arrays import METRICS as METRIC_KEYS
from mgcc_dist.reporting.image_arrays import ImageArrays
from mgcc_dist.reporting.runs import Run, RunCollection

HEADINGS = {
    ("corrected", "iou"): "IoU",
    ("lesion", "iou"): "lesion IoU",
    ("lesion", "dice"): "lesion Dice",
    ("specificity",): "specificity",
}
RUN_KEYS = {"weights", "weights_sha256", "method", "network"}
"""of a run in summary.json"""
MAIN = ("IoU", "lesion Dice")
"""headings of the metrics that are shown first; the others are details"""
SHOWN = [metric for metric in METRICS if metric.path in HEADINGS]
Means = dict[str, Interval | None]
"""by heading; None where no image has the score"""
INTERVALS = (
    "Intervals are 95 %, by BCa bootstrap over patients or groups of near-duplicates; none for fewer than 10 of them. "
    "They hold for other patients, not for other seeds."
)
UNGROUPED = "Results of earlier versions do not name the groups of images. There the interval resamples single images."


@dataclass(frozen=True)
class TestSet:
    """What images were scored, and how. Scores on different ones are not comparable."""

    dataset: str
    how: str
    """which images, their size, and what was done to the predictions"""


@dataclass(frozen=True)
class Evaluation:
    """A folder that `mgcc evaluate` wrote."""

    folder: Path
    summary: dict[str, Any]

    @cached_property
    def rows(self) -> dict[TestSet, list[Row]]:
        """the rows of images.csv by data set"""
        request = self.summary["request"]
        size = f"{request['size']} px" if request["size"] else "stored size"
        steps = [str(self.summary["postprocess"]["setting"]), *(f"tta {name}" for name in request["tta"])]
        threshold = self.summary.get("threshold", {}).get("value", DEFAULT)  # earlier versions had no other
        steps += [f"threshold {threshold:g}"] * (threshold != DEFAULT)
        weights = self.summary["config"]["weights"]
        changes = [step for step in steps if step != "none"] + [f"{weights} weights"] * (weights != "best")
        how = ", ".join([_part(request["subset"]), size, *changes])
        sets: dict[TestSet, list[Row]] = {}
        with (self.folder / IMAGES).open(newline="") as file:
            for row in csv.DictReader(file):
                sets.setdefault(TestSet(row["dataset"], how), []).append(_parse(row))
        return sets


def find_evaluations(folders: Iterable[Path], collection: RunCollection) -> list[Evaluation]:
    """Find all finished evaluations below `folders`, each once. Damaged ones are left out of `collection`."""
    found: dict[Path, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob(REQUEST)):
            if (path.parent / SUMMARY).is_file() and (path.parent / IMAGES).is_file():
                found.setdefault(path.parent.resolve(), path.parent)
    remedy = "Repeat the evaluation into another folder."
    evaluations = []
    for folder in found.values():
        try:
            evaluation = Evaluation(folder, read_versioned(folder / SUMMARY, FORMAT, VERSION, remedy))
            if evaluation.rows and all(info.keys() >= RUN_KEYS for info in evaluation.summary["runs"]):
                evaluations.append(evaluation)
                continue
            collection.leave_out(f"{folder}: holds an evaluation without images or runs. {remedy}")
        except UserError as error:
            collection.leave_out(error)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            collection.leave_out(f"{folder}: holds a damaged evaluation ({error!r}). {remedy}")
    return evaluations


def own_rows(run: Run) -> list[Row]:
    """Return the images that a run's tables are about (`Run.scored`), at its best step; none in some early results."""
    return _rows(run.scored("best").get("images"), run.result.get("dataset", "-"))


def all_rows(run: Run) -> dict[TestSet, list[Row]]:
    """Return the images that a run scored at its best step: its own data set's and those of `data.external`."""
    data = run.config.get("data", {})
    size = f"{data.get('image_size', 256)} px" if data.get("fit", "stretch") in STRETCHED else "stored size"
    part = "test" if "test" in run.result["best"] else "validation"
    sets = {TestSet(run.result.get("dataset", "-"), f"{_part(part)}, {size}"): own_rows(run)}
    for dataset, scored in run.result["best"].get("external", {}).items():
        sets[TestSet(dataset, f"{_part(None)}, {size}")] = _rows(scored.get("images"), dataset)
    return {test_set: rows for test_set, rows in sets.items() if rows}


def means(rows: Sequence[Row]) -> Means:
    """Average the metrics that tables show, in percent. Rows of several runs on one image are one cluster."""
    return {
        HEADINGS[metric.path]: _percent(interval) if interval else None
        for metric, interval in zip(SHOWN, average(rows, SHOWN), strict=True)
    }


def group_note(rows: Iterable[Row]) -> list[str]:
    """Return the note that belongs under a table with these rows."""
    return [UNGROUPED] if any(row["ungrouped"] for row in rows) else []


def _rows(images: ImageArrays | None, dataset: str) -> list[Row]:
    if images is None:
        return []
    names = [NAMES.get(name, name) for name in METRIC_KEYS]
    without_lesion = np.isnan(images.protocol("lesion")[:, 0]).tolist()
    columns = zip(
        *(images.keys, images.groups, images.predicted_empty, without_lesion, images.protocol("corrected").tolist()),
        strict=True,
    )
    return [
        {
            "dataset": dataset,
            "key": key,
            "group": group or key,
            "ungrouped": group is None,
            "lesion": not normal,
            "predicted_area": 0.0 if empty else None,
            **dict(zip(names, scores, strict=True)),
        }
        for key, group, empty, normal, scores in columns
    ]


def _parse(row: dict[str, str]) -> Row:
    """Convert what `SHOWN` needs of a row of images.csv."""
    numbers = {name: float(row[name]) for name in ("predicted_area", "iou", "dice", "recall", "precision")}
    texts = {name: row[name] for name in ("dataset", "key", "group")}
    return {**texts, "ungrouped": False, "lesion": row["lesion"] == "1", **numbers}


def _part(subset: str | None) -> str:
    return {None: "all images", "validation": "val", "test": "test part"}.get(subset, f"{subset} images")


def _percent(interval: Interval) -> Interval:
    low, high = (None if bound is None else 100 * bound for bound in (interval.low, interval.high))
    return Interval(100 * interval.mean, low, high, interval.images, interval.clusters)
