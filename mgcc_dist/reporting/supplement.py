"""The sections of the report that compare runs: cases, cross-set matrix, splits, learning curves, ranks, ..."""

from collections.abc import Sequence
from pathlib import Path

from mgcc_dist.reporting.image_scores import find_evaluations
from mgcc_dist.reporting.labels import name_groups
from mgcc_dist.reporting.runs import RunCollection, group_runs
from mgcc_dist.reporting.sections import cross_set, differences, folds, label_fractions, ranks, synthetic
from mgcc_dist.reporting.tables import ResultTable
from mgcc_dist.reporting.views import ReportSection


def supplement(
    found: RunCollection, folders: Sequence[Path], tables: Sequence[ResultTable], cases: bool
) -> list[ReportSection]:
    """Return the sections that the runs have data for, in the order of the page; the cases only if `cases`."""
    sweep_rows = {
        run.folder: row
        for table in tables
        for results in table.results.values()
        for row, result in results.items()
        for run in result.finished.values()
    }
    rows = name_groups(group_runs(found.segmentation), sweep_rows)
    if cases:
        from mgcc_dist.reporting.sections import case_grid  # imports torch, which other reports don't need

        chosen = case_grid.section(rows)
    sections = [
        chosen if cases else None,
        folds.section(rows),
        cross_set.section(rows, find_evaluations(folders, found)),
        label_fractions.section(rows),
        ranks.section(rows),
        synthetic.section(found, folders),
        differences.section(rows),
    ]
    return [section for section in sections if section]
