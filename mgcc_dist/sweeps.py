"""Print the commands of a sweep: one per preparation step and one per run (rows x data sets x seeds).

    mgcc sweep configs/sweeps/table_1.yaml --datasets BUSI | sh

runs them one after another. To run two at a time:

    mgcc sweep configs/sweeps/table_1.yaml | xargs -P 2 -d '\\n' -I{} sh -c '{}'

Rerun the same command to resume; finished runs are skipped. `mgcc slurm submit FILE` submits the same runs to a
cluster, and `mgcc report --sweep FILE` builds the table of the finished ones.

mgcc_dist/common/sweep_file.py describes the file format.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.sweep_file import read_sweep


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="sweeps", description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("sweep", type=str, help="sweep file")
    parser.add_argument("--datasets", type=str, nargs="+", default=[], help="print only runs on these data sets")
    parser.add_argument("--rows", type=str, nargs="+", default=[], help="print only these rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="print only these seeds")
    try:
        chosen = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    except ArgumentError as error:
        raise UserError(" ".join(error.message.split())) from error
    sweep = read_sweep(Path(chosen.sweep))
    known: dict[str, list[Any]] = {
        "datasets": list(sweep.columns),
        "rows": list(sweep.rows),
        "seeds": sorted({run.seed for run in sweep.runs}),
    }
    for key, names in known.items():
        if unknown := [name for name in chosen[key] if name not in names]:
            choices = ", ".join(map(str, names))
            raise UserError(f"--{key}: {unknown[0]!r} is not in {chosen.sweep}. Choose from: {choices}.")
    for step in sweep.steps:
        print(shlex.join([sys.executable, *step.command()]))
    for run in sweep.runs:
        values = {"datasets": run.dataset, "rows": run.row, "seeds": run.seed}
        if all(value in (chosen[key] or known[key]) for key, value in values.items()):
            print(shlex.join([sys.executable, *run.command()]))


if __name__ == "__main__":
    run_program("sweeps", main)
