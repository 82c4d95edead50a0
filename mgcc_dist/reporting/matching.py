"""Assign run folders to the cells of a sweep's table, by the identity of their runs."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.identity import describe_difference, identity
from mgcc_dist.reporting.runs import Run, RunCollection
from mgcc_dist.sweep.expansion import Sweep
from mgcc_dist.sweep.runs import SweepRun, is_same_run
from mgcc_dist.train.saved_run import differences

SEED_FOLDER = re.compile(r"seed_(-?\d+)(?:-|$)")


def match_runs(sweep: Sweep, found: RunCollection, folders: Sequence[Path]) -> list[tuple[SweepRun, Run | None]]:
    """Pair every run of the sweep with its run folder, finished or unfinished, or with None if there is none.

    A run is expected in its folder below the sweep's `out`. The same relative path below one of `folders`, which were
    searched for `found`, counts too, so that runs can be moved or copied from another machine. A folder whose name ends
    in another hash counts if it holds the same run.

    Raises:
        UserError: a finished run in the folder of a sweep's run is another one, or two folders hold the same run.
    """
    nearby_runs: dict[tuple[Path, int], list[Run]] = {}
    for run in (*found.segmentation, *found.unfinished):
        if name := SEED_FOLDER.match(run.folder.name):
            nearby_runs.setdefault((run.folder.resolve().parent, int(name[1])), []).append(run)
    resolved: dict[Path, list[Path]] = {}  # the rows of a sweep have hundreds of runs
    matched: list[tuple[SweepRun, Run | None]] = []
    for wanted in sweep.runs:
        parent = wanted.folder.parent
        if parent not in resolved:
            resolved[parent] = [each.resolve() for each in _possible_parents(sweep, wanted, folders)]
        parents = dict.fromkeys(resolved[parent])
        nearby = [run for each in parents for run in nearby_runs.get((each, wanted.seed), ())]
        candidates = [run for run in nearby if run.folder.name == wanted.folder.name]
        candidates += [run for run in nearby if run not in candidates and is_same_run(run.folder, wanted.config)]
        if len(candidates) > 1:
            first, second, *_ = (run.folder.resolve() for run in candidates)
            raise UserError(
                f"{sweep.name}: {wanted.row} on {wanted.dataset}, seed {wanted.seed}, is in both {first} and {second}. "
                "Pass only the folder of one."
            )
        if candidates and candidates[0].result:
            _check_config(sweep, wanted, candidates[0])
        matched.append((wanted, candidates[0] if candidates else None))
    return matched


def _possible_parents(sweep: Sweep, wanted: SweepRun, folders: Sequence[Path]) -> Iterable[Path]:
    parent = wanted.folder.parent
    relative = parent.relative_to(sweep.out)
    return [parent, *(base / relative for folder in folders for base in (folder, folder / sweep.out.name))]


def _check_config(sweep: Sweep, wanted: SweepRun, run: Run) -> None:
    """Raise UserError for the first key in which the run differs from the sweep's."""
    if run.identity == identity(wanted.config):
        return
    if differing := differences(run.folder, wanted.config):
        key, actual, expected, more = describe_difference(differing)
        raise UserError(
            f"{run.folder}: {key} is {actual}, but {sweep.name} sets {expected}{more}. "
            "Move the folder elsewhere and rerun that row, or correct the sweep file."
        )
