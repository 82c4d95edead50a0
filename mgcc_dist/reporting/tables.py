"""Build a sweep's table: every row, data set, protocol and metric, with the paper's values and paired tests."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mgcc_dist.common.errors import UserError
from mgcc_dist.evaluation.statistics import Difference, holm, paired_bootstrap
from mgcc_dist.reporting.image_arrays import METRICS, PROTOCOLS, ImageArrays
from mgcc_dist.reporting.matching import match_runs
from mgcc_dist.reporting.paper import PaperTable, load_paper_table
from mgcc_dist.reporting.runs import Run, RunCollection, find_repeats, lookup
from mgcc_dist.sweep.expansion import Sweep


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

    @cached_property
    def repeats(self) -> dict[Path, str]:
        return find_repeats(list(self.finished.values()))

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
            repeats = find_repeats(list(finished.values()))
            distinct = [run for run in finished.values() if run.folder not in repeats]
            unfinished = [run for _, run in runs if run and not run.result]
            scores = {
                (protocol, metric): Score(
                    _values(distinct, protocol, metric),
                    paper.score(row, column, metric) if paper and protocol == "paper" else None,
                )
                for protocol in PROTOCOLS
                for metric in METRICS
            }
            results[dataset][row] = RowResult(len(runs), finished, unfinished, scores)
        if sweep.reference:
            results[dataset] = _with_tests(results[dataset], sweep.reference)
    return ResultTable(sweep, paper, results)


def _values(runs: Sequence[Run], protocol: str, metric: str) -> tuple[float, ...]:
    values = [lookup(run.scored("best")["summary"], (protocol, metric)) for run in runs]
    return tuple(100 * value for value in values if value is not None)


def _with_tests(results: dict[str, RowResult], reference: str) -> dict[str, RowResult]:
    """Add a paired test against the reference to all other rows of one data set."""
    scores = {row: dict(result.scores) for row, result in results.items()}
    for protocol in PROTOCOLS:
        of_reference = _image_scores(results[reference], protocol)
        tests = {
            row: test
            for row, result in results.items()
            if row != reference
            and (test := paired_bootstrap(*_differences(of_reference, _image_scores(result, protocol))))
        }
        for index, metric in enumerate(METRICS):
            corrected = holm([test[index].p for test in tests.values()])
            for (row, test), p_holm in zip(tests.items(), corrected, strict=True):
                score = scores[row][protocol, metric]
                scores[row][protocol, metric] = dataclasses.replace(score, test=test[index], p_holm=p_holm)
    return {row: dataclasses.replace(result, scores=scores[row]) for row, result in results.items()}


@dataclass(frozen=True)
class _ImageScores:
    folder: Path
    keys: list[str]
    """sorted"""
    values: np.ndarray
    """float64 [images, METRICS]; NaN for an image without scores"""


def _image_scores(result: RowResult, protocol: str) -> dict[int, _ImageScores]:
    """Return the scores of single images by seed."""
    scores = {}
    for seed, run in result.finished.items():
        images = run.scored("best").get("images") or ImageArrays([], {})
        order = sorted(range(len(images)), key=images.keys.__getitem__)
        scores[seed] = _ImageScores(
            run.folder, [images.keys[index] for index in order], images.protocol(protocol)[order]
        )
    return scores


def _differences(reference: dict[int, _ImageScores], others: dict[int, _ImageScores]) -> tuple[np.ndarray, np.ndarray]:
    """Return per image, sorted by key: sum over the common seeds of 100 * (reference - other) [N,M], and count [N]."""
    keys: list[str] = []
    values = [np.empty((0, len(METRICS)))]
    for seed in sorted(reference.keys() & others.keys()):
        ours, theirs = reference[seed], others[seed]
        if ours.keys != theirs.keys:
            unpaired = min(set(ours.keys) ^ set(theirs.keys))
            raise UserError(
                f"{ours.folder} and {theirs.folder} cannot be compared: {unpaired!r} was scored in only one of them. "
                "Train both on the same split and shards."
            )
        difference = 100 * (ours.values - theirs.values)
        scored = ~np.isnan(difference).any(axis=1)  # the lesion protocol skips images without a lesion
        keys += [key for key, kept in zip(ours.keys, scored.tolist(), strict=True) if kept]
        values.append(difference[scored])
    names = sorted(set(keys))  # np.unique would sort the keys of all seeds
    index = {name: row for row, name in enumerate(names)}
    image = np.fromiter((index[key] for key in keys), np.int64, len(keys))
    sums = np.zeros((len(names), len(METRICS)))
    np.add.at(sums, image, np.concatenate(values))
    return sums, np.bincount(image, minlength=len(names)).astype(np.int64)
