"""Which run folder belongs to which cell of a sweep's table: the one in its place, if it is of the config asked for."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mgcc_dist.common.config import CONFIGS, as_plain, flatten, parse
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.sweep_file import FREE, Sweep, SweepRun
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.reporting.runs import Found, Run


def match(sweep: Sweep, found: Found, folders: Sequence[Path]) -> list[tuple[SweepRun, Run | None]]:
    """Every run that the sweep asks for, with the folder that holds it: finished, unfinished or None.

    A run's place is its folder in the sweep's `out`. `folders`, in which `found` was found, may stand for `out`, so
    that runs that were moved or copied from elsewhere count too.

    Raises:
        UserError: a finished run in a cell's place has another config, or two folders claim the same cell.
    """
    there = {run.folder.resolve(): run for run in (*found.segmentation, *found.unfinished)}
    matched: list[tuple[SweepRun, Run | None]] = []
    for asked in sweep.runs:
        candidates = {place.resolve(): there[place.resolve()] for place in _places(sweep, asked, folders, there)}
        if len(candidates) > 1:
            one, other, *_ = candidates
            raise UserError(
                f"{sweep.name}: {asked.row} on {asked.dataset}, seed {asked.seed}, is both in {one} and in {other}; "
                "name only the folders of one"
            )
        run = next(iter(candidates.values()), None)
        if run and run.result:
            _check(sweep, asked, run)
        matched.append((asked, run))
    return matched


def _places(sweep: Sweep, asked: SweepRun, folders: Sequence[Path], there: Iterable[Path]) -> list[Path]:
    inside = asked.folder.relative_to(sweep.out)
    places = [asked.folder, *(base / inside for folder in folders for base in (folder, folder / sweep.out.name))]
    return [place for place in places if place.resolve() in there]


def _check(sweep: Sweep, asked: SweepRun, run: Run) -> None:
    """Raise UserError for a key in which the run is not what the sweep asks for; defaults of `segment` count too."""
    words = asked.command()[2:]  # without -m mgcc_dist.segment
    wanted = flatten(as_plain(parse(SegmentConfig, "segment", "", CONFIGS / "segment", None, words)))
    has = flatten(run.config)
    if differing := sorted(key for key in wanted.keys() | has.keys() if wanted.get(key) != has.get(key)):
        differing = [key for key in differing if key not in FREE]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
        raise UserError(
            f"{run.folder} has {key} = {has.get(key)}, but {sweep.name} asks for {wanted.get(key)}{more}; "
            "delete or move the folder and run that row again, or correct the sweep file"
        )
