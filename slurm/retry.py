"""The last words of a batch script: `python -m mgcc_dist.slurm.retry CODE FOLDER` after a step that ended with CODE.

A step that crashed (a rank was killed, the GPU or the network failed) is tried again from its last checkpoint; as often
as `attempts` says without progress. Wrong settings are not: the same would come of them.
"""

import sys
from pathlib import Path

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission, JobPaths

from mgcc_dist.slurm import cluster
from mgcc_dist.slurm.shared import SharedPrograms
from mgcc_dist.slurm.task import Program, attempts_of


def main(code: int, folder: Path) -> None:
    if code == 0 or not cluster.is_this_job_running():  # it is requeued already, or cancelled
        return
    job = JobEnvironment()
    program = DelayedSubmission.load(JobPaths(folder, job.job_id).submitted_pickle).function
    assert isinstance(program, (Program, SharedPrograms))
    if [each for each in program.left() if _has_attempts(each, code)]:
        cluster.requeue(job.job_id)


def _has_attempts(program: Program, code: int) -> bool:
    sofar = attempts_of(program.folder)
    if sofar.get("hopeless"):
        return False
    said = f"slurm: ended with code {code}, attempt {sofar['attempts']} of {program.attempts} from step {sofar['step']}"
    again = sofar["attempts"] < program.attempts
    more = "requeued" if again else "given up; `python -m mgcc_dist.slurm resume` starts it again"
    print(f"{said}: {more}", file=sys.stderr)
    return again


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
