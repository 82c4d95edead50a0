"""Per-split and pooled results of one configuration: folds, or repeated splits."""

import statistics
from collections import Counter
from collections.abc import Sequence

from mgcc_dist.evaluation.summary import Row as ImageRow
from mgcc_dist.evaluation.summary import cluster_of
from mgcc_dist.reporting.image_scores import HEADINGS, INTERVALS, MAIN, group_note, means, own_rows
from mgcc_dist.reporting.labels import Row
from mgcc_dist.reporting.runs import Run
from mgcc_dist.reporting.views import NO_VALUE, Cell, ReportSection, TableView, format_score, mean_cell

Family = tuple[str, str]
"""data set and kind of split"""


def section(rows: Sequence[Row]) -> ReportSection | None:
    """Tabulate rows whose runs have different splits, by data set and kind of split; None if there are none."""
    families: dict[Family, list[Row]] = {}
    for row in rows:
        if len({run.result["split"] for run in row.group.distinct if run.scored("best").get("images")}) > 1:
            families.setdefault((row.group.dataset, row.group.split_kind), []).append(row)
    if not families:
        return None
    shown: dict[bool, list[TableView]] = {True: [], False: []}
    notes = []
    for (dataset, kind), members in families.items():
        images = {row.label: _by_split(row) for row in members}
        for heading, table in _tables(f"{dataset}, {kind}", members, images).items():
            shown[heading in MAIN].append(table)
        notes += group_note(image for splits in images.values() for rows in splits.values() for image in rows)
    legend = [
        "Corrected protocol, best step, in percent. Pooled: mean over the images of all splits, with its interval. "
        "Over splits: mean ± sample standard deviation of the columns to its right. The deviation is not a standard "
        "error, because the training sets of splits overlap.",
        INTERVALS,
        *dict.fromkeys(notes),
    ]
    return ReportSection("By split, and pooled", [], shown[True], legend, shown[False])


def _by_split(row: Row) -> dict[str, list[ImageRow]]:
    """Return the scored images by the number of the split, those of several seeds together."""
    splits: dict[str, list[ImageRow]] = {}
    for run in sorted(row.group.distinct, key=_number):
        if images := own_rows(run):
            splits.setdefault(run.result["split"], []).extend(images)
    return splits


def _number(run: Run) -> tuple[int, int]:
    digits = run.result["split"].rpartition("_")[2]
    return int(digits) if digits.isdigit() else 0, run.result["seed"]


def _tables(caption: str, rows: Sequence[Row], images: dict[str, dict[str, list[ImageRow]]]) -> dict[str, TableView]:
    """Return a table per metric, by its heading."""
    names = list(dict.fromkeys(name for splits in images.values() for name in splits))
    pooled = {label: means([image for rows in splits.values() for image in rows]) for label, splits in images.items()}
    single = {label: {name: means(rows) for name, rows in splits.items()} for label, splits in images.items()}
    counts = _describe(images[rows[0].label])
    tables = {}
    for heading in HEADINGS.values():
        if not any(scores[heading] for scores in pooled.values()):
            continue
        cells = []
        for row in rows:
            each = [single[row.label][name][heading] if name in single[row.label] else None for name in names]
            known = [interval.mean for interval in each if interval]
            spread = format_score(statistics.mean(known), statistics.stdev(known)) if len(known) > 1 else NO_VALUE
            cells.append((row.label, [mean_cell(pooled[row.label][heading]), Cell(spread), *map(mean_cell, each)]))
        groups = [("", ["pooled", "over splits"]), ("by split", names)]
        runs = {row.label: row.names for row in rows}
        tables[heading] = TableView(f"{heading}: {caption}, {counts}", groups, cells, runs)
    return tables


def _describe(splits: dict[str, list[ImageRow]]) -> str:
    """Say how many images and groups were scored, and whether an image counts more than once."""
    rows = [row for images in splits.values() for row in images]
    clusters = len({cluster_of(row) for row in rows})
    times = Counter(row["key"] for images in splits.values() for row in {row["key"]: row for row in images}.values())
    several = sum(number > 1 for number in times.values())
    often = "each in one split" if not several else f"{several} of them in several splits"
    return f"{len(times)} images of {clusters} groups, {often}"
