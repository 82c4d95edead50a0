"""Expand a sweep file to runs and steps with resolved, checked configs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgcc_dist.common.components import import_plugin
from mgcc_dist.common.errors import UserError, did_you_mean
from mgcc_dist.sweep.runs import SweepRun, expand_runs, resolve_runs
from mgcc_dist.sweep.schema import find_sweep, read_file
from mgcc_dist.sweep.search import Search, read_search, search_pair
from mgcc_dist.sweep.steps import SweepStep, expand_steps


@dataclass(frozen=True)
class Sweep:
    name: str
    """the file's stem"""
    path: Path
    title: str
    paper: str | None
    """key in configs/paper/tables.yaml"""
    reference: str | None
    """the row that the others are tested against"""
    out: Path
    rows: dict[str, dict[str, Any]]
    """row name -> its keys of `segment`, nested"""
    columns: dict[str, str]
    """data set -> column of the paper's table"""
    runs: list[SweepRun]
    """ordered by seed, then data set, then row"""
    steps: list[SweepStep]
    """steps of `prepare`, without duplicates, each after those it needs"""
    search: Search | None
    notes: str


def read_sweep(name: str | Path) -> Sweep:
    """Read and expand a sweep file, or the shipped sweep of that name.

    Raises:
        UserError: the file can't be read, or a key of the sweep, of a run or of a step's program is missing, unknown or
            has an impossible value; the message names the file, the row or step, and the key.
    """
    file = read_file(find_sweep(name))
    for module in file.imports:
        try:
            import_plugin(module)
        except UserError as error:
            raise UserError(f"{file.path}: import: {error}") from error
    pairs = list(zip(file.seeds, file.splits, strict=True))
    steps, chains = expand_steps(file, list(dict.fromkeys([*pairs, *search_pair(file)])))
    runs: dict[tuple[int, str, str], SweepRun] = {}
    for dataset in file.datasets or [None]:
        for row in file.rows:
            configs = resolve_runs(file, dataset, row, pairs)
            if dataset is not None:
                runs |= {
                    (run.seed, dataset, row): run for run in expand_runs(file, dataset, row, pairs, configs, chains)
                }
    ordered = [runs[seed, dataset, row] for seed, _ in pairs for dataset in file.datasets for row in file.rows]
    return Sweep(
        file.path.stem,
        file.path,
        file.title,
        file.paper,
        file.reference,
        file.out,
        rows={name: row.keys for name, row in file.rows.items()},
        columns={name: dataset.column for name, dataset in file.datasets.items()},
        runs=ordered,
        steps=steps,
        search=read_search(file, chains),
        notes=file.notes,
    )


def select(sweep: Sweep, datasets: Sequence[str] = (), rows: Sequence[str] = (), seeds: Sequence[int] = ()) -> Sweep:
    """Keep the runs on some data sets, of some rows and with some seeds, and the steps that these need; no search.

    Raises:
        UserError: the sweep has no such data set, row or seed.
    """
    if not (datasets or rows or seeds):
        return sweep
    known: dict[str, list[Any]] = {
        "datasets": list(sweep.columns),
        "rows": list(sweep.rows),
        "seeds": list(dict.fromkeys(run.seed for run in sweep.runs)),
    }
    for key, chosen in (("datasets", datasets), ("rows", rows), ("seeds", seeds)):
        if unknown := [name for name in chosen if name not in known[key]]:
            names = [str(name) for name in known[key]]
            hint = did_you_mean(str(unknown[0]), names) or f" Choose from: {', '.join(names)}."
            raise UserError(f"--{key}: {unknown[0]!r} is not in {sweep.path}.{hint}")
        known[key] = [name for name in known[key] if name in chosen] if chosen else known[key]
    runs = [
        run
        for run in sweep.runs
        if run.dataset in known["datasets"] and run.row in known["rows"] and run.seed in known["seeds"]
    ]
    needed = {name for run in runs for name in run.needs}
    return replace(
        sweep,
        reference=sweep.reference if sweep.reference in known["rows"] else None,
        rows={row: sweep.rows[row] for row in known["rows"]},
        columns={dataset: sweep.columns[dataset] for dataset in known["datasets"]},
        runs=runs,
        steps=[step for step in sweep.steps if step.name in needed],
        search=None,
    )
