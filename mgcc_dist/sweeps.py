"""Print the commands of a sweep: one per preparation step and one per run (rows x data sets x seeds), and its search.

    mgcc sweep table_1 --datasets BUSI | sh

runs them one after another. To run two at a time, if the sweep has no `prepare` steps:

    mgcc sweep my_sweep.yaml | xargs -P 2 -d '\\n' -I{} sh -c '{}'

Rerun the same command to resume; finished runs are skipped. `mgcc slurm submit FILE` submits the same runs to a
cluster, and `mgcc report --sweep FILE` builds the table of the finished ones.

All keys of all runs and steps are checked first. docs/reference/file-formats.md describes the file format.
"""

import shlex
import sys

from mgcc_dist.common.errors import run_program
from mgcc_dist.common.program import Command, Program
from mgcc_dist.sweep.selection import SelectionOptions


def run(config: SelectionOptions) -> None:
    """Print one command per selected run, after those of the steps that these runs need, and that of the search."""
    sweep = config.read()
    commands = [*(step.command() for step in sweep.steps), *(run.command() for run in sweep.runs)]
    if sweep.search:
        commands.append(sweep.search.command())
    for command in commands:
        print(shlex.join([sys.executable, *command]))


PROGRAM = Program("sweep", __doc__, Command(SelectionOptions, run, "print the commands of a sweep", __doc__))
main = PROGRAM.main

if __name__ == "__main__":
    run_program("sweeps", main)
