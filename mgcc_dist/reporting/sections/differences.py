"""The keys in which the rows of a report differ."""

from collections.abc import Sequence
from typing import Any

from mgcc_dist.common.config import as_plain, flatten
from mgcc_dist.reporting.labels import Row
from mgcc_dist.reporting.runs import Run
from mgcc_dist.reporting.views import NO_VALUE, Cell, ReportSection, TableView

TITLE = "What differs between the rows"
FIRST = ("", "images", "method", "network")
ADDED = {
    "training": "unlabeled",
    "synthetic": "synthetic",
    "synthetic_labeled": "synthetic pairs",
    "similar": "similar",
}
"""numbers in a result's `images`, and what they are called here"""


def section(rows: Sequence[Row]) -> ReportSection | None:
    """Tabulate every key of the rows' identities that is not the same in all of them; None for a single row."""
    if len(rows) < 2:
        return None
    identities = [_facts(row) | row.group.runs[0].settings for row in rows]
    keys = sorted({key for each in identities for key in each}, key=_order)
    values = [_all_keys(row.group.runs[0]) for row in rows]
    differing = [key for key in keys if len({repr(each.get(key)) for each in identities}) > 1]
    if not differing:
        return ReportSection(TITLE, ["The rows differ in no key."], [], [])
    sections: dict[str, list[str]] = {}
    for key in differing:
        sections.setdefault(key.rpartition(".")[0], []).append(key)
    groups = [(name, [key.rpartition(".")[2] for key in keys]) for name, keys in sections.items()]
    cells = [
        (row.label, [Cell(_format(each.get(key, full.get(key)))) for keys in sections.values() for key in keys])
        for row, each, full in zip(rows, identities, values, strict=True)
    ]
    view = TableView("", groups, cells, {row.label: row.names for row in rows})
    legend = [
        f"{NO_VALUE}: the row's method or network does not have the key. Seeds, numbers of splits, and keys that do "
        "not affect results are left out.",
    ]
    return ReportSection(TITLE, [], [view], legend)


def _order(key: str) -> tuple[int, str, bool, str]:
    """Sort by section, the most telling ones first, and within a section the name of its component first."""
    section, _, name = key.rpartition(".")
    return FIRST.index(section) if section in FIRST else len(FIRST), section, name != "name", key


def _facts(row: Row) -> dict[str, Any]:
    """Return what a row was trained on; the paths of its config may differ where the data is the same."""
    group = row.group
    images = group.runs[0].result.get("images", {})
    counts = {f"images.{name}": images.get(count, 0) for count, name in ADDED.items()}
    return {
        "data set": group.dataset,
        "split": group.split_kind,
        "images.labeled": images.get("labeled"),
        **counts,
    }


def _all_keys(run: Run) -> dict[str, Any]:
    return flatten(as_plain(run.segment_config) if run.segment_config else run.config)


def _format(value: Any) -> str:
    return NO_VALUE if value is None else str(value)
