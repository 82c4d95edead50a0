"""Build a sweep's table: every row, data set, protocol and metric, with the paper's values and paired tests."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgcc_dist.common.errors import UserError
from mgcc_dist.evaluation.statistics import Difference, holm, paired_bootstrap
from mgcc_dist.reporting.matching import match_runs
from mgcc_dist.reporting.paper import PaperTable, load_paper_table
from mgcc_dist.reporting.runs import Run, RunCollection, find_repeats, lookup
from mgcc_dist.sweep.expansion import Sweep

PROTOCOLS = ("paper", "corrected", "lesion")
METRICS = ("iou", "recall", "precision", "f1")


@dataclass(frozen=True)
class Score:
    """One metric of one row on one data set under one protocol, in percent."""

    values: tuple[float, ...]
    """one per finished run, at its best step"""
    paper: tuple[float, float | None] | None = None
    """the paper's mean and standard deviation; only under the `paper` protocol"""
    test: Difference | None = None
    """paired test of the reference row minus this row"""
    p_holm: float | None = None
    """p value, Holm-corrected over the other rows in the same column"""

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the runs."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Our mean minus the paper's."""
        return self.mean - self.paper[0] if self.mean is not None and self.paper else None


@dataclass(frozen=True)
class RowResult:
    """The runs and scores of one row on one data set."""

    expected: int
    """number of runs in the sweep"""
    finished: dict[int, Run]
    """by seed"""
    unfinished: list[Run]
    scores: dict[tuple[str, str], Score]
    """by protocol and metric"""

    @property
    def missing(self) -> int:
        """Number of runs that have not finished or not started."""
        return self.expected - len(self.finished)


@dataclass(frozen=True)
class ResultTable:
    sweep: Sweep
    paper: PaperTable | None
    results: dict[str, dict[str, RowResult]]
    """data set -> row -> result, for every combination"""


def build_table(sweep: Sweep, found: RunCollection, folders: Sequence[Path]) -> ResultTable:
    """Build the table of a sweep from the runs in `found`, which were searched for below `folders`.

    Raises:
        UserError: the sweep has no runs, a run's config differs from the sweep's, two runs of the same split were
            scored on different images, or the sweep's `paper` is not a table of the paper.
    """
    if not sweep.runs:
        raise UserError(f"{sweep.name}: the sweep has no runs. Use --efficiency to measure parameters and latency.")
    paper = load_paper_table(sweep.paper) if sweep.paper else None
    matched = match_runs(sweep, found, folders)
    results: dict[str, dict[str, RowResult]] = {}
    for dataset, column in sweep.columns.items():
        results[dataset] = {}
        for row in sweep.rows:
            runs = [(wanted.seed, run) for wanted, run in matched if (wanted.dataset, wanted.row) == (dataset, row)]
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
            results[dataset][row] = RowResult(len(runs), finished, unfinished, scores)
        if sweep.reference:
            results[dataset] = _with_tests(results[dataset], sweep.reference)
    return ResultTable(sweep, paper, results)


def _values(runs: dict[int, Run], protocol: str, metric: str) -> tuple[float, ...]:
    repeats = find_repeats(list(runs.values()))
    distinct = [run for run in runs.values() if run.folder not in repeats]
    values = [lookup(run.scored("best")["summary"], (protocol, metric)) for run in distinct]
    return tuple(100 * value for value in values if value is not None)


def _with_tests(results: dict[str, RowResult], reference: str) -> dict[str, RowResult]:
    """Add a paired test against the reference to all other rows of one data set."""
    scores = {row: dict(result.scores) for row, result in results.items()}
    for protocol in PROTOCOLS:
        tests = {
            row: test
            for row, result in results.items()
            if row != reference
            and (test := paired_bootstrap(*_differences(results[reference].finished, result.finished, protocol)))
        }
        for index, metric in enumerate(METRICS):
            corrected = holm([test[index].p for test in tests.values()])
            for (row, test), p_holm in zip(tests.items(), corrected, strict=True):
                score = scores[row][protocol, metric]
                scores[row][protocol, metric] = dataclasses.replace(score, test=test[index], p_holm=p_holm)
    return {row: dataclasses.replace(result, scores=scores[row]) for row, result in results.items()}


def _differences(reference: dict[int, Run], others: dict[int, Run], protocol: str) -> tuple[np.ndarray, np.ndarray]:
    """Return per image, sorted by key: sum over the common seeds of 100 * (reference - other) [N,M], and count [N]."""
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for seed in sorted(reference.keys() & others.keys()):
        ours, theirs = _image_scores(reference[seed], protocol), _image_scores(others[seed], protocol)
        if unpaired := sorted(ours.keys() ^ theirs.keys()):
            raise UserError(
                f"{reference[seed].folder} and {others[seed].folder} cannot be compared: {unpaired[0]!r} was scored in "
                "only one of them. Train both on the same split and shards."
            )
        for key, our_scores in ours.items():
            their_scores = theirs[key]
            if our_scores and their_scores:  # the lesion protocol skips images without a lesion
                pair = np.array([100 * (our_scores[metric] - their_scores[metric]) for metric in METRICS])
                sums[key] = sums.get(key, 0) + pair
                counts[key] = counts.get(key, 0) + 1
    keys = sorted(sums)
    return (
        np.array([sums[key] for key in keys]).reshape(-1, len(METRICS)),
        np.array([counts[key] for key in keys], dtype=np.int64),
    )


def _image_scores(run: Run, protocol: str) -> dict[str, dict[str, float] | None]:
    return {image["key"]: image[protocol] for image in run.scored("best").get("images", ())}
