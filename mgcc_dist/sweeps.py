"""A sweep file expands to runs: the rows of a table x data sets x seeds; and to what must be made before them.

    python -m mgcc_dist.sweeps configs/sweeps/table_1.yaml --datasets BUSI | sh

prints one command a run, for `sh` (one after the other) or for several at a time:

    ... | xargs -P 2 -d '\\n' -I{} sh -c '{}'

The same line again goes on where it was stopped. `mgcc_dist.slurm` submits the same runs to a cluster, and
`mgcc_dist.report --sweep` reads the same file and puts the finished runs into the table.

mgcc_dist/common/sweep_file.py describes the file.
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
    parser.add_argument("--datasets", type=str, nargs="+", default=[], help="only these")
    parser.add_argument("--rows", type=str, nargs="+", default=[], help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="only these")
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
            raise UserError(f"{chosen.sweep} has no {key} {unknown[0]!r}; choose of {', '.join(map(str, names))}")
    for step in sweep.steps:
        print(shlex.join([sys.executable, *step.command()]))
    for run in sweep.runs:
        is_of = {"datasets": run.dataset, "rows": run.row, "seeds": run.seed}
        if all(name in (chosen[key] or known[key]) for key, name in is_of.items()):
            print(shlex.join([sys.executable, *run.command()]))


if __name__ == "__main__":
    run_program("sweeps", main)
