"""Run trials of a sweep's `search` until its study is complete: Optuna proposes them, and stops bad ones early.

    mgcc search my_sweep.yaml                # trials one after another; start it several times to run some at a time
    mgcc slurm submit my_sweep.yaml          # the same on a cluster, with `workers` tasks

The study, one run folder per trial, and the best config as a preset are in OUT/search/. A worker that is signalled
saves its trial. The next worker that starts resumes it, and also trials whose worker was killed. To add trials, set a
larger `trials` in the sweep file and start the same command again.

docs/reference/file-formats.md describes the keys of `search`. Needs the extra `search`.
"""

import logging
from dataclasses import dataclass

from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.program import Command, Program
from mgcc_dist.common.value_types import NonNegativeInt
from mgcc_dist.sweep.expansion import read_sweep
from mgcc_dist.sweep.selection import SweepOptions

logger = logging.getLogger("mgcc_dist.search")


@dataclass(frozen=True)
class WorkerOptions(SweepOptions):
    worker: NonNegativeInt = 0
    """number of this worker, in the name of the file that it writes at the end"""


def run(config: WorkerOptions) -> None:
    """Run trials until the study is complete, and write the best config."""
    from mgcc_dist.sweep.worker import SearchWorker

    search = read_sweep(config.sweep).search
    if search is None:
        raise UserError(f"{config.sweep}: has no `search`. Add one, or use `mgcc sweep` to run its rows.")
    SearchWorker(search, config.worker).run()


PROGRAM = Program("search", __doc__, Command(WorkerOptions, run, "run trials of a sweep's search", __doc__))
main = PROGRAM.main

if __name__ == "__main__":
    run_program("search", main)
