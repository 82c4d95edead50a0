"""Assign run folders to the cells of a sweep's table, and check that their configs match the sweep file."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS, as_plain, flatten
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.sweep_file import RESULT_NEUTRAL_KEYS, Sweep, SweepRun
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.reporting.runs import Run, RunCollection


def match_runs(sweep: Sweep, found: RunCollection, folders: Sequence[Path]) -> list[tuple[SweepRun, Run | None]]:
    """Pair every run of the sweep with its run folder, finished or unfinished, or with None if there is none.

    A run is expected in its folder below the sweep's `out`. The same relative path below one of `folders`, which were
    searched for `found`, counts too, so that runs can be moved or copied from another machine.

    Raises:
        UserError: a finished run has another config than the sweep asks for, or two folders hold the same run.
    """
    by_folder = {run.folder.resolve(): run for run in (*found.segmentation, *found.unfinished)}
    matched: list[tuple[SweepRun, Run | None]] = []
    for wanted in sweep.runs:
        resolved = [folder.resolve() for folder in _possible_folders(sweep, wanted, folders)]
        candidates = {folder: by_folder[folder] for folder in resolved if folder in by_folder}
        if len(candidates) > 1:
            first, second, *_ = candidates
            raise UserError(
                f"{sweep.name}: {wanted.row} on {wanted.dataset}, seed {wanted.seed}, is in both {first} and {second}. "
                "Pass only the folder of one."
            )
        run = next(iter(candidates.values()), None)
        if run and run.result:
            _check_config(sweep, wanted, run)
        matched.append((wanted, run))
    return matched


def _possible_folders(sweep: Sweep, wanted: SweepRun, folders: Sequence[Path]) -> Iterable[Path]:
    relative = wanted.folder.relative_to(sweep.out)
    return [wanted.folder, *(base / relative for folder in folders for base in (folder, folder / sweep.out.name))]


def _check_config(sweep: Sweep, wanted: SweepRun, run: Run) -> None:
    """Raise UserError for the first key in which the run differs from the sweep; defaults of `segment` count too."""
    arguments = wanted.command()[2:]  # without -m mgcc_dist.segment
    expected = flatten(as_plain(parse(SegmentConfig, arguments, CONFIGS / "segment")))
    actual = flatten(run.config)
    keys = sorted((expected.keys() | actual.keys()) - RESULT_NEUTRAL_KEYS)
    differing = [key for key in keys if expected.get(key) != actual.get(key)]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
        raise UserError(
            f"{run.folder}: {key} is {actual.get(key)}, but {sweep.name} sets {expected.get(key)}{more}. "
            "Delete or move the folder and rerun that row, or correct the sweep file."
        )
