"""Print the commands of a sweep: one per preparation step and one per run (rows x data sets x seeds).

    mgcc sweep configs/sweeps/table_1.yaml --datasets BUSI | sh

runs them one after another. To run two at a time, if the sweep has no `prepare` steps:

    mgcc sweep configs/sweeps/table_1.yaml | xargs -P 2 -d '\\n' -I{} sh -c '{}'

Rerun the same command to resume; finished runs are skipped. `mgcc slurm submit FILE` submits the same runs to a
cluster, and `mgcc report --sweep FILE` builds the table of the finished ones.

mgcc_dist/common/sweep_file.py describes the file format.
"""

import shlex
import sys
from dataclasses import dataclass
from typing import Any

from mgcc_dist.common.errors import UserError, did_you_mean, run_program
from mgcc_dist.common.options import argument
from mgcc_dist.common.program import Command, Program
from mgcc_dist.common.sweep_file import read_sweep
from mgcc_dist.common.value_types import FilePath, Name


@dataclass(frozen=True)
class SweepConfig:
    sweep: FilePath = argument(positional=True)
    """sweep file"""
    datasets: tuple[Name, ...] = argument((), nargs="+")
    """print only runs on these data sets"""
    rows: tuple[Name, ...] = argument((), nargs="+")
    """print only these rows"""
    seeds: tuple[int, ...] = argument((), nargs="+")
    """print only these seeds"""


def run(config: SweepConfig) -> None:
    """Print one command per preparation step and per selected run."""
    sweep = read_sweep(config.sweep)
    known: dict[str, list[Any]] = {
        "datasets": list(sweep.columns),
        "rows": list(sweep.rows),
        "seeds": sorted({run.seed for run in sweep.runs}),
    }
    chosen = {key: getattr(config, key) for key in known}
    for key, names in known.items():
        if unknown := [name for name in chosen[key] if name not in names]:
            hint = did_you_mean(str(unknown[0]), map(str, names)) or f" Choose from: {', '.join(map(str, names))}."
            raise UserError(f"--{key}: {unknown[0]!r} is not in {config.sweep}.{hint}")
    for step in sweep.steps:
        print(shlex.join([sys.executable, *step.command()]))
    for run in sweep.runs:
        values = {"datasets": run.dataset, "rows": run.row, "seeds": run.seed}
        if all(value in (chosen[key] or known[key]) for key, value in values.items()):
            print(shlex.join([sys.executable, *run.command()]))


PROGRAM = Program("sweep", __doc__, Command(SweepConfig, run, "print the commands of a sweep", __doc__))
main = PROGRAM.main

if __name__ == "__main__":
    run_program("sweeps", main)
