"""The keys in which the rows of a report differ."""

from collections.abc import Sequence
from typing import Any

from mgcc_dist.common.config import as_plain, flatten
from mgcc_dist.reporting.labels import Row
from mgcc_dist.reporting.runs import Run
from mgcc_dist.reporting.views import NO_VALUE, Cell, ReportSection, TableView

TITLE = "What differs between the rows"


def section(rows: Sequence[Row]) -> ReportSection | None:
    """Tabulate every key of the rows' identities that is not the same in all of them; None for a single row."""
    if len(rows) < 2:
        return None
    identities = [_facts(row) | row.group.runs[0].settings for row in rows]
    keys = sorted(
        {key for each in identities for key in each}, key=lambda key: ("." in key, not key.endswith(".name"), key)
    )
    values = [_all_keys(row.group.runs[0]) for row in rows]
    differing = [key for key in keys if len({repr(each.get(key)) for each in identities}) > 1]
    cells = [
        (key, [Cell(_format(each.get(key, full.get(key)))) for each, full in zip(identities, values, strict=True)])
        for key in differing
    ]
    counts = [(row.label, [Cell(str(len(row.group.distinct)))]) for row in rows]
    by_row = TableView("Runs", [("", ["runs"])], counts, {row.label: row.names for row in rows})
    view = TableView("Keys", [("", [row.label for row in rows])], cells)
    legend = [
        f"{NO_VALUE}: the row's method or network does not have the key. Seeds, numbers of splits, and keys that do "
        "not affect results are left out.",
    ]
    return ReportSection(
        TITLE, [] if cells else ["The rows differ in no key."], [view, by_row] if cells else [by_row], legend
    )


def _facts(row: Row) -> dict[str, Any]:
    """Return what a row was trained on; the paths of its config may differ where the data is the same."""
    group = row.group
    images = group.runs[0].result.get("images", {})
    counts = {f"images, {name}": images.get(name, 0) for name in ("labeled", "training", "synthetic", "similar")}
    return {"data set": group.dataset, "split": group.split_kind, **counts}


def _all_keys(run: Run) -> dict[str, Any]:
    return flatten(as_plain(run.segment_config) if run.segment_config else run.config)


def _format(value: Any) -> str:
    return NO_VALUE if value is None else str(value)
