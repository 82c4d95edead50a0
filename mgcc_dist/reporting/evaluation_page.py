"""Render an evaluation as one HTML page with all tables, figures and pictures embedded."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from mgcc_dist.evaluation.cases import RULE
from mgcc_dist.evaluation.corruptions import STRENGTHS
from mgcc_dist.reporting.evaluation_figures import plot_robustness, plot_scores, plot_trust
from mgcc_dist.reporting.templates import embed_png, format_time, render
from mgcc_dist.reporting.views import NO_VALUE, Cell, TableView

Summary = Mapping[str, Any]
OVERLAP = {"iou": "IoU", "dice": "Dice", "recall": "Recall", "precision": "Precision"}
# Heading, path in a summary, scale, decimals.
Column = tuple[str, tuple[str, ...], float, int]
CONTOUR: list[Column] = [
    ("HD95 px", ("hd95",), 1, 1),
    ("ASSD px", ("assd",), 1, 1),
    ("NSD %", ("nsd",), 100, 1),
    ("HD95 penalized", ("hd95_penalized",), 1, 1),
    ("ASSD penalized", ("assd_penalized",), 1, 1),
]
IN_MM: list[Column] = [
    ("HD95 mm", ("hd95_mm",), 1, 2),
    ("ASSD mm", ("assd_mm",), 1, 2),
    ("NSD mm %", ("nsd_mm",), 100, 1),
]
ALARMS: list[Column] = [
    ("Specificity", ("specificity",), 100, 1),
    ("False alarm, % of the image", ("false_alarm_area",), 100, 2),
]
BY_SUBSET: list[Column] = [
    ("IoU", ("corrected", "iou"), 100, 1),
    ("lesion IoU", ("lesion", "iou"), 100, 1),
    ("lesion Dice", ("lesion", "dice"), 100, 1),
    *CONTOUR[:3],
    ALARMS[0],
]


def render_evaluation(summary: Summary, rows: Sequence[dict[str, Any]], gallery: Path) -> str:
    """Return the page as HTML that needs no other file and no network."""
    overall = summary["overall"]
    return render(
        "evaluation.html",
        created=format_time(datetime.now(UTC)),
        summary=summary,
        overall=overall,
        title=_title(summary),
        protocols=protocol_table(overall),
        contour=_one_row("", CONTOUR + (IN_MM if overall["hd95_mm"] else []), overall),
        alarms=_one_row("", ALARMS, overall) if overall["specificity"] else None,
        subsets=_subset_table(summary),
        scores=plot_scores(rows) if overall["lesions"] else None,
        trust=plot_trust(dict(summary)),
        robustness=plot_robustness(dict(summary)) if summary["corruptions"] else None,
        robustness_tables=_robustness_tables(summary),
        gallery=embed_png(gallery),
        rule=RULE,
        settings=yaml.safe_dump(summary["config"], sort_keys=False),
        versions=", ".join(f"{name} {version}" for name, version in summary["environment"]["versions"].items()),
    )


def _title(summary: Summary) -> str:
    datasets = " + ".join(dict.fromkeys(summary["datasets"]))
    runs = summary["runs"]
    one = f"{runs[0]['network']['name']} ({runs[0]['method']})"
    return f"{one if len(runs) == 1 else f'Ensemble of {len(runs)} runs'} on {datasets}"


def protocol_table(overall: Summary) -> TableView:
    """One row per protocol: overlap metrics in percent with their intervals as notes."""
    rows = []
    for protocol in ("corrected", "lesion", "paper"):
        columns: list[Column] = [(label, (protocol, name), 100, 1) for name, label in OVERLAP.items()]
        count = overall["lesions" if protocol == "lesion" else "images"]
        rows.append((protocol, [Cell(str(count)), *(mean_cell(overall, column) for column in columns)]))
    return TableView("", [("", ["images"]), ("", list(OVERLAP.values()))], rows)


def _one_row(name: str, columns: Sequence[Column], summary: Summary) -> TableView:
    cells = [mean_cell(summary, column, with_images=True) for column in columns]
    return TableView("", [("", [heading for heading, *_ in columns])], [(name, cells)])


def _subset_table(summary: Summary) -> TableView | None:
    if not summary["subsets"]:
        return None
    rows = [("all", summary["overall"]), *((_subset_name(each), each) for each in summary["subsets"])]
    return TableView(
        "",
        [("", ["images"]), ("", [heading for heading, *_ in BY_SUBSET])],
        [
            (name, [Cell(str(each["images"])), *(mean_cell(each, column) for column in BY_SUBSET)])
            for name, each in rows
        ],
    )


def _subset_name(subset: Summary) -> str:
    if "lesion_area" not in subset:
        return f"{subset['by']}: {subset['name']}"
    low, high = (100 * area for area in subset["lesion_area"])
    return f"{subset['by']}: {subset['name']} ({low:.1f} to {high:.1f} %)"


def _robustness_tables(summary: Summary) -> list[TableView]:
    """Lesion Dice, and specificity if there are normal images: one row per corruption, one column per strength."""
    columns: list[Column] = [("Lesion Dice", ("lesion", "dice"), 100, 1)]
    if summary["overall"]["specificity"]:
        columns.append(ALARMS[0])
    strengths: dict[str, list[Summary]] = {}
    for each in summary["corruptions"]:
        strengths.setdefault(each["name"], [summary["overall"]]).append(each)
    headings = ["none", *(str(strength) for strength in range(1, STRENGTHS + 1))]
    return [
        TableView(
            column[0],
            [(f"{column[0]} at strength", headings)],
            [(name, [mean_cell(each, column) for each in all_strengths]) for name, all_strengths in strengths.items()],
        )
        for column in columns
    ]


def mean_cell(summary: Summary, column: Column, with_images: bool = False) -> Cell:
    """Format a mean of a summary, with its interval and, `with_images`, the number of images as the note."""
    _, path, scale, decimals = column
    mean: Any = summary
    for name in path:
        mean = mean[name]
    if mean is None:
        return Cell(NO_VALUE)
    low, high = mean["low"], mean["high"]
    interval = "" if low is None else f"{scale * low:.{decimals}f} to {scale * high:.{decimals}f}"
    images = f"{mean['images']} images" if with_images else ""
    return Cell(f"{scale * mean['mean']:.{decimals}f}", note=", ".join(filter(None, (interval, images))))
