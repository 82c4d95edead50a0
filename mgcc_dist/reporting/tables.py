"""A sweep's table: every row, data set, protocol and metric, with the paper's figure and a paired test beside it."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.sweep_file import Sweep
from mgcc_dist.evaluation.statistics import Difference, holm, paired_bootstrap
from mgcc_dist.reporting.matching import match
from mgcc_dist.reporting.paper import PaperTable, paper_table
from mgcc_dist.reporting.runs import Found, Run, at

PROTOCOLS = ("paper", "corrected", "lesion")
METRICS = ("iou", "recall", "precision", "f1")


@dataclass(frozen=True)
class Score:
    """One row, data set, protocol and metric, in percent."""

    values: tuple[float, ...]
    """of each finished run, at its best step"""
    paper: tuple[float, float | None] | None = None
    """the paper's mean and standard deviation; under its own protocol alone"""
    test: Difference | None = None
    """the reference row minus this one, image by image"""
    p_holm: float | None = None
    """the test's p value, corrected for the table's other rows in the same column"""

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the runs."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return self.mean - self.paper[0] if self.mean is not None and self.paper else None


@dataclass(frozen=True)
class Cell:
    """One row and data set."""

    asked: int
    """runs that the sweep asks for"""
    finished: dict[int, Run]
    """by seed"""
    unfinished: list[Run]
    scores: dict[tuple[str, str], Score]
    """by protocol and metric"""

    @property
    def missing(self) -> int:
        """Runs that are not finished, begun or not."""
        return self.asked - len(self.finished)


@dataclass(frozen=True)
class Table:
    sweep: Sweep
    paper: PaperTable | None
    cells: dict[str, dict[str, Cell]]
    """data set -> row -> cell, for every one of both"""


def make_table(sweep: Sweep, found: Found, folders: Sequence[Path]) -> Table:
    """The table of a sweep, from the runs in `found`, which were looked for in `folders`.

    Raises:
        UserError: the sweep has no runs, a run is not what the sweep asks for, two runs of the same split were scored
            on different images, or the sweep's `paper` is no table of the paper.
    """
    if not sweep.runs:
        raise UserError(f"{sweep.name} asks for no run; a table of costs is made by --efficiency")
    paper = paper_table(sweep.paper) if sweep.paper else None
    places = match(sweep, found, folders)
    cells: dict[str, dict[str, Cell]] = {}
    for dataset, column in sweep.columns.items():
        cells[dataset] = {}
        for row in sweep.rows:
            runs = [(asked.seed, run) for asked, run in places if (asked.dataset, asked.row) == (dataset, row)]
            finished = {seed: run for seed, run in runs if run and run.result}
            unfinished = [run for _, run in runs if run and not run.result]
            scores = {
                (protocol, metric): Score(
                    _values(finished, protocol, metric),
                    paper.score(row, column, metric) if paper and protocol == "paper" else None,
                )
                for protocol in PROTOCOLS
                for metric in METRICS
            }
            cells[dataset][row] = Cell(len(runs), finished, unfinished, scores)
        if sweep.reference:
            cells[dataset] = _tested(cells[dataset], sweep.reference)
    return Table(sweep, paper, cells)


def _values(runs: dict[int, Run], protocol: str, metric: str) -> tuple[float, ...]:
    values = [at(run.result["best"]["summary"], (protocol, metric)) for run in runs.values()]
    return tuple(100 * value for value in values if value is not None)


def _tested(cells: dict[str, Cell], reference: str) -> dict[str, Cell]:
    """The cells of one data set, those but the reference's with a paired test against it."""
    scores = {row: dict(cell.scores) for row, cell in cells.items()}
    for protocol in PROTOCOLS:
        tests = {
            row: tested
            for row, cell in cells.items()
            if row != reference
            and (tested := paired_bootstrap(*_differences(cells[reference].finished, cell.finished, protocol)))
        }
        for place, metric in enumerate(METRICS):
            corrected = holm([tested[place].p for tested in tests.values()])
            for (row, tested), p_holm in zip(tests.items(), corrected, strict=True):
                old = scores[row][protocol, metric]
                scores[row][protocol, metric] = dataclasses.replace(old, test=tested[place], p_holm=p_holm)
    return {row: dataclasses.replace(cell, scores=scores[row]) for row, cell in cells.items()}


def _differences(ours: dict[int, Run], others: dict[int, Run], protocol: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each image, in the order of keys: sum over the common seeds of 100 * (ours - other) [N,M]; how many [N]."""
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for seed in sorted(ours.keys() & others.keys()):
        one, other = _images(ours[seed], protocol), _images(others[seed], protocol)
        if apart := sorted(one.keys() ^ other.keys()):
            raise UserError(
                f"{ours[seed].folder} and {others[seed].folder} cannot be compared: {apart[0]!r} was scored in only "
                "one of them; were they trained on different splits or shards?"
            )
        for key, scores in one.items():
            beside = other[key]
            if scores and beside:  # the lesion protocol leaves images out
                pair = np.array([100 * (scores[metric] - beside[metric]) for metric in METRICS])
                sums[key] = sums.get(key, 0) + pair
                counts[key] = counts.get(key, 0) + 1
    keys = sorted(sums)
    return (
        np.array([sums[key] for key in keys]).reshape(-1, len(METRICS)),
        np.array([counts[key] for key in keys], dtype=np.int64),
    )


def _images(run: Run, protocol: str) -> dict[str, dict[str, float] | None]:
    return {image["key"]: image[protocol] for image in run.result["best"].get("images", ())}
