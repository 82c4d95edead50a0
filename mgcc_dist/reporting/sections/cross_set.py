"""Cross-set matrix: rows trained on, columns tested on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mgcc_dist.common.files import sha256_of
from mgcc_dist.evaluation.summary import Row as ImageRow
from mgcc_dist.reporting.image_scores import HEADINGS, INTERVALS, MAIN, Evaluation, TestSet, all_rows, group_note, means
from mgcc_dist.reporting.labels import Row
from mgcc_dist.reporting.runs import format_names
from mgcc_dist.reporting.views import Cell, ReportSection, TableView, mean_cell
from mgcc_dist.train.initial_weights import WEIGHTS


@dataclass
class MatrixRow:
    trained_on: str
    runs: dict[str, None] = field(default_factory=dict)
    """names of runs, in order"""
    images: dict[TestSet, list[ImageRow]] = field(default_factory=dict)

    def add(self, name: str, sets: dict[TestSet, list[ImageRow]]) -> None:
        self.runs[name] = None
        for test_set, rows in sets.items():
            self.images.setdefault(test_set, []).extend(rows)


def section(rows: Sequence[Row], evaluations: Sequence[Evaluation]) -> ReportSection | None:
    """Tabulate all test sets of all runs; None if no run was tested on another data set than its own."""
    own_only = not any(run.result["best"].get("external") for row in rows for run in row.group.runs)
    matrix = {} if own_only and not evaluations else _matrix(rows, evaluations)
    if not matrix:
        return None
    columns = sorted({test_set for row in matrix.values() for test_set in row.images}, key=_order)
    scores = {
        label: {test_set: means(images) for test_set, images in row.images.items()} for label, row in matrix.items()
    }
    runs = {label: format_names(list(row.runs)) for label, row in matrix.items()}
    shown: dict[bool, list[TableView]] = {True: [], False: []}
    for heading in HEADINGS.values():
        # A test set that has no such score, like the specificity without normal images, is left out.
        known = [test_set for test_set in columns if any(row.get(test_set, {}).get(heading) for row in scores.values())]
        cells: list[tuple[str, list[Cell]]] = [
            (
                label,
                [
                    Cell(row.trained_on),
                    *(
                        mean_cell(scores[label].get(test_set, {}).get(heading), test_set.dataset == row.trained_on)
                        for test_set in known
                    ),
                ],
            )
            for label, row in matrix.items()
        ]
        datasets = dict.fromkeys(test_set.dataset for test_set in known)
        groups = [(name, [test_set.how for test_set in known if test_set.dataset == name]) for name in datasets]
        if known:
            shown[heading in MAIN].append(TableView(heading, [("", ["trained on"]), *groups], cells, runs))
    legend = [
        "Mean over images in percent, corrected protocol, best step. Several runs of a row are pooled. Shaded: images "
        "of the data set that a row was trained on.",
        INTERVALS,
        *group_note(image for row in matrix.values() for images in row.images.values() for image in images),
    ]
    return ReportSection("Trained on one data set, tested on others", [], shown[True], legend, shown[False])


def _matrix(rows: Sequence[Row], evaluations: Sequence[Evaluation]) -> dict[str, MatrixRow]:
    """Return the rows that were tested on another data set than their own, by label."""
    matrix: dict[str, MatrixRow] = {}
    for row in rows:
        for run in row.group.distinct:
            matrix.setdefault(row.label, MatrixRow(run.result.get("dataset", "-"))).add(run.name, all_rows(run))
    owners = _owners(rows) if evaluations else {}
    for evaluation in evaluations:
        label, trained_on, names = _trained(evaluation, owners)
        matrix_row = matrix.setdefault(label, MatrixRow(trained_on))
        sets = evaluation.rows
        for name in names:
            matrix_row.add(name, {})
        # A run's own result has the same scores of the same images: count them once.
        new = {test_set: images for test_set, images in sets.items() if not _repeats(matrix_row, test_set, images)}
        matrix_row.add(names[0], new)
    return {
        label: row
        for label, row in matrix.items()
        if any(test_set.dataset != row.trained_on for test_set in row.images)
    }


def _repeats(row: MatrixRow, test_set: TestSet, images: Sequence[ImageRow]) -> bool:
    known = {(image["key"], image["iou"]) for image in row.images.get(test_set, ())}
    return all((image["key"], image["iou"]) in known for image in images)


def _owners(rows: Sequence[Row]) -> dict[str, tuple[Row, str]]:
    """Return the row and the name of each run, by the sha256 of its weights; these stay when a folder is moved."""
    owners = {}
    for row in rows:
        for run in row.group.distinct:
            for weights in ("best", "last"):
                if (path := run.folder / weights / WEIGHTS).is_file():
                    owners[sha256_of(path)] = (row, run.name)
    return owners


def _trained(evaluation: Evaluation, owners: dict[str, tuple[Row, str]]) -> tuple[str, str, list[str]]:
    """Return the label, data set and run names of what was evaluated."""
    infos = evaluation.summary["runs"]
    known = [owners.get(info["weights_sha256"]) for info in infos]
    datasets = " and ".join(dict.fromkeys(str(info.get("dataset") or "unknown") for info in infos))
    names = [
        owner[1] if owner else str(Path(info["weights"]).parent.parent)
        for owner, info in zip(known, infos, strict=True)
    ]
    if len(infos) == 1:
        if known[0]:
            return known[0][0].label, datasets, names
        return f"{infos[0]['method']} ({infos[0]['network']['name']}), {names[0]}", datasets, names
    labels = dict.fromkeys(
        owner[0].label if owner else info["method"] for owner, info in zip(known, infos, strict=True)
    )
    return f"ensemble of {len(infos)}: {', '.join(labels)}", datasets, names


def _order(test_set: TestSet) -> tuple[str, str]:
    return test_set.dataset, test_set.how
