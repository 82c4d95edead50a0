"""The last command of the batch script: `python -m mgcc_dist.slurm.retry CODE FOLDER`, with srun's exit code.

Requeues a job that crashed (a killed rank, a failed GPU or network), so that it resumes from its last checkpoint, up to
`attempts` times without progress. Starts that end before the program records them count as well. Jobs with invalid
settings are not requeued, since they would fail again.
"""

import sys
from pathlib import Path

from submitit import JobEnvironment, SlurmJob

from mgcc_dist.slurm import cluster
from mgcc_dist.slurm.packing import PackedPrograms
from mgcc_dist.slurm.worker import Program, is_attempt_recorded, read_attempts, record_attempt


def main(code: int, folder: Path) -> None:
    if code == 0 or not cluster.is_this_job_running():  # already requeued, or cancelled
        return
    job = JobEnvironment().job_id
    submitted = SlurmJob(folder, job).submission().function
    assert isinstance(submitted, (Program, PackedPrograms))
    if [program for program in submitted.unfinished() if _has_attempts_left(program, code)]:
        cluster.requeue(job)


def _has_attempts_left(program: Program, code: int) -> bool:
    if not is_attempt_recorded(program.folder):
        try:
            record_attempt(program.folder, program.output, program.max_attempts)
        except SystemExit:  # after printing the reason
            return False
    previous = read_attempts(program.folder)
    if previous.get("hopeless"):
        return False
    retry = previous["attempts"] < program.max_attempts
    action = "requeued" if retry else "giving up. Fix the cause, then run `mgcc slurm resume SWEEP`."
    attempt = f"attempt {previous['attempts']} of {program.max_attempts} from step {previous['step']}"
    print(f"slurm: exit code {code}, {attempt}: {action}", file=sys.stderr)
    return retry


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
