"""The last words of a batch script: `python -m mgcc_dist.slurm.retry CODE FOLDER` after a step that ended with CODE.

A step that crashed (a rank was killed, the GPU or the network failed) is tried again from its last checkpoint; as often
as `attempts` says without progress. Wrong settings are not: the same would come of them.
"""

import sys
from pathlib import Path

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission, JobPaths

from mgcc_dist.slurm import cluster
from mgcc_dist.slurm.task import Program, attempts_of


def main(code: int, folder: Path) -> None:
    if code == 0 or not cluster.is_this_job_running():  # it is requeued already, or cancelled
        return
    job = JobEnvironment()
    program = DelayedSubmission.load(JobPaths(folder, job.job_id).submitted_pickle).function
    assert isinstance(program, Program)
    sofar = attempts_of(program.folder)
    if sofar.get("hopeless"):
        return
    said = f"slurm: ended with code {code}, attempt {sofar['attempts']} of {program.attempts} from step {sofar['step']}"
    if sofar["attempts"] >= program.attempts:
        print(f"{said}: given up; `python -m mgcc_dist.slurm resume` starts it again", file=sys.stderr)
        return
    print(f"{said}: requeued", file=sys.stderr)
    cluster.requeue(job.job_id)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
