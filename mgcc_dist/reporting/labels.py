"""Name the rows of tables and the curves of figures: groups of runs, each by what sets it apart from the others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgcc_dist.reporting.runs import RunGroup, format_names

Part = Callable[[RunGroup], str]


@dataclass(frozen=True)
class Row:
    """A group of runs under the name that it has everywhere in a report."""

    label: str
    group: RunGroup

    @property
    def names(self) -> str:
        """the names of its runs, without repeats"""
        return format_names([run.name for run in self.group.distinct])


def name_groups(groups: Sequence[RunGroup], sweep_rows: Mapping[Path, str]) -> list[Row]:
    """Name each group by the sweep's row of its runs (by folder), else by method and network.

    Groups that share that name get what differs between them: sources of unlabeled images, kind of split, data set,
    number of labels, then settings; in the end the name of a run.
    """
    labels = [_base(group, sweep_rows) for group in groups]
    for part in _parts(groups):
        shared = {label for label in labels if labels.count(label) > 1}
        for label in shared:
            members = [index for index, other in enumerate(labels) if other == label]
            if len({part(groups[index]) for index in members}) > 1:
                for index in members:
                    labels[index] = ", ".join(filter(None, [label, part(groups[index])]))
    return [Row(label, group) for label, group in zip(labels, groups, strict=True)]


def sources(group: RunGroup) -> list[str]:
    """Return which other images the runs were trained with: "synthetic", "synthetic pairs", "similar"."""
    data = group.runs[0].config.get("data", {})
    names = {"synthetic": "synthetic", "synthetic_labeled": "synthetic pairs", "similar": "similar"}
    return [name for key, name in names.items() if data.get(key)]


def _base(group: RunGroup, sweep_rows: Mapping[Path, str]) -> str:
    rows = {sweep_rows[run.folder] for run in group.runs if run.folder in sweep_rows}
    if len(rows) == 1:
        return rows.pop()
    network = group.runs[0].result["network"].get("name", "")
    return group.method if group.runs[0].result["method"] == network else f"{group.method} ({network})"


def _parts(groups: Sequence[RunGroup]) -> Iterator[Part]:
    yield lambda group: " and ".join(sources(group))
    yield lambda group: group.split_kind
    yield lambda group: group.dataset
    yield lambda group: f"{group.count('labeled')} labels"
    keys = {key: None for group in groups for key in group.runs[0].settings}
    for key in keys:
        yield lambda group, key=key: _setting(group, key)  # type: ignore[misc]
    yield lambda group: group.runs[0].name


def _setting(group: RunGroup, key: str) -> str:
    value: Any = group.runs[0].settings.get(key)
    return f"{key} {value}" if value is not None else ""
