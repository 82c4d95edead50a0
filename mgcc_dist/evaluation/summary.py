"""Average the rows of an evaluation: all images, and subsets by class, lesion size, data set and device."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mgcc_dist.evaluation.calibration import Array, reliability, risk_coverage
from mgcc_dist.evaluation.statistics import Interval, mean_intervals

Row = dict[str, Any]
FORMAT = "mgcc-dist evaluation"
VERSION = 1
REQUEST, IMAGES, SUMMARY = "evaluate.json", "images.csv", "summary.json"
"""files of the folder that `mgcc evaluate` writes; the last one completes it"""
NAMES = {"f1": "dice", "asd": "assd", "asd_penalized": "assd_penalized"}
"""what the field calls the metrics of evaluation/metrics.py"""
OVERLAP = ("iou", "dice", "recall", "precision")


@dataclass(frozen=True)
class Metric:
    """A mean over images: what each image contributes, or None if it does not count."""

    path: tuple[str, ...]
    """its path of keys in a summary"""
    value: Callable[[Row], float | None]
    bounded: bool = True
    """whether it is in [0,1]"""


def _column(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(name)


def _of_lesions(name: str) -> Callable[[Row], float | None]:
    return lambda row: row[name] if row["lesion"] else None


METRICS = [
    *(Metric(("corrected", name), _column(name)) for name in OVERLAP),
    *(Metric(("lesion", name), _of_lesions(name)) for name in OVERLAP),
    *(Metric(("paper", name), _column(f"paper_{name}")) for name in OVERLAP),
    # False alarms: images without lesion that are predicted empty, and the share of such an image that is predicted.
    Metric(("specificity",), lambda row: None if row["lesion"] else float(row["predicted_area"] == 0)),
    Metric(("false_alarm_area",), lambda row: None if row["lesion"] else row["predicted_area"]),
    *(
        Metric((name,), _column(name), bounded=False)
        for name in ("hd95", "assd", "hd95_penalized", "assd_penalized", "hd95_mm", "assd_mm")
    ),
    *(Metric((name,), _column(name)) for name in ("nsd", "nsd_mm", "brier")),
]


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Average rows of images.csv, each metric over the images that have it.

    Returns {"images", "lesions", "groups": numbers, "corrected": {"iou": mean, ...}, "lesion": {...}, "paper": {...},
    "specificity": mean, "false_alarm_area": mean, "hd95": mean, ...} where a mean is {"mean", "low", "high", "images",
    "clusters"} or None. Intervals resample the groups of the records (patients or near-duplicates).
    """
    summary: dict[str, Any] = {
        "images": len(rows),
        "lesions": sum(row["lesion"] for row in rows),
        "groups": len(set(map(cluster_of, rows))),
    }
    for metric, interval in zip(METRICS, average(rows, METRICS), strict=True):
        inner = summary
        for name in metric.path[:-1]:
            inner = inner.setdefault(name, {})
        inner[metric.path[-1]] = asdict(interval) if interval else None
    return summary


def average(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[Interval | None]:
    """Average each metric over the rows that have it; intervals resample `cluster_of` the rows."""
    values = np.array([[_number(metric.value(row)) for metric in metrics] for row in rows])
    return mean_intervals(values, list(map(cluster_of, rows)), [metric.bounded for metric in metrics])


def cluster_of(row: Row) -> str:
    """Return the patient or group of near-duplicates of a row, unique over data sets."""
    return f"{row['dataset']}/{row['group']}"


def add_sizes(rows: Sequence[Row]) -> None:
    """Give each row its lesion-size tercile `size`: small, medium, large; None without a lesion.

    The terciles divide the lesions of these rows by their share of the image.
    """
    areas = [row["lesion_area"] for row in rows if row["lesion"]]
    bounds = np.quantile(areas, [1 / 3, 2 / 3]) if areas else []
    for row in rows:
        tercile = int(np.searchsorted(bounds, row["lesion_area"]))
        row["size"] = ("small", "medium", "large")[tercile] if row["lesion"] else None


SUBSETS = {"class": "class", "size": "lesion size", "dataset": "data set", "device": "device"}
"""columns that define subsets, and what they are called"""


def summarize_subsets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Summarize the rows that share a class, a lesion size, a data set or a device: {"by", "name", ...summary}.

    A column in which all rows are alike, or unknown, defines no subset.
    """
    return [
        {"by": SUBSETS[column], "name": name} | _extent(column, subset) | summarize(subset)
        for column in SUBSETS
        for name, subset in _split_by(rows, column)
    ]


def summarize_trust(rows: Sequence[Row], bins: Sequence[Array]) -> dict[str, Any]:
    """Summarize calibration, and the use of confidence and of the score (if there is one) for sorting."""
    risks = [1 - row["dice"] for row in rows]
    confidences = [row["confidence"] for row in rows]
    trust = {"reliability": reliability(bins), "risk_coverage": risk_coverage(confidences, risks)}
    if "score" in rows[0]:
        trust["risk_coverage_by_score"] = risk_coverage([row["score"] for row in rows], risks)
    return trust


def _split_by(rows: Sequence[Row], column: str) -> Iterator[tuple[str, list[Row]]]:
    values = [row[column] for row in rows if row[column] is not None]
    # Sizes in the order small, medium, large; everything else by name.
    names = ("small", "medium", "large") if column == "size" else sorted(set(values))
    if len(set(values)) > 1:
        for name in names:
            if subset := [row for row in rows if row[column] == name]:
                yield name, subset


def _extent(column: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the range of lesion areas of a tercile, so that a reader knows what is called small."""
    areas = [row["lesion_area"] for row in rows]
    return {"lesion_area": [min(areas), max(areas)]} if column == "size" else {}


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
