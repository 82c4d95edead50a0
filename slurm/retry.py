"""Decide at a job's end whether to requeue it: `python -m mgcc_dist.slurm.retry CODE FOLDER`, with srun's exit code.

Exits with 0 if the batch script should requeue the job, and with 1 otherwise. Runs where the programs ran, in their
container too. The batch script calls scontrol itself, outside of the container: an image then needs no Slurm, no munge
and no configuration of the site, whose versions would have to match.

A job that was signalled is requeued. One that crashed (a killed rank, a failed GPU or network) is requeued up to
`attempts` times without progress, and resumes from its last checkpoint. Starts that end before the program records
them count as well. Jobs with invalid settings are not requeued, since they would fail again.
"""

import sys
from pathlib import Path

from submitit import JobEnvironment, SlurmJob

from mgcc_dist.slurm.packing import PackedPrograms
from mgcc_dist.slurm.worker import Program, is_attempt_recorded, read_attempts, record_attempt


def should_requeue(code: int, folder: Path) -> bool:
    """Return whether another start of the current job can finish its programs."""
    submitted = SlurmJob(folder, JobEnvironment().job_id).submission().function
    assert isinstance(submitted, (Program, PackedPrograms))
    have_attempts_left = [_has_attempts_left(program, code) for program in submitted.unfinished()]  # each says why
    return any(have_attempts_left)


def _has_attempts_left(program: Program, code: int) -> bool:
    if not is_attempt_recorded(program.folder):
        try:
            record_attempt(program.folder, program.output, program.max_attempts)
        except SystemExit:  # after printing the reason
            return False
    previous = read_attempts(program.folder)
    if previous.get("hopeless"):
        return False
    if previous.get("signalled"):
        print("slurm: stopped by a signal: requeued", file=sys.stderr)
        return True
    retry = previous["attempts"] < program.max_attempts
    action = "requeued" if retry else "giving up. Fix the cause, then run `mgcc slurm resume SWEEP`."
    attempt = f"attempt {previous['attempts']} of {program.max_attempts} from step {previous['step']}"
    print(f"slurm: exit code {code}, {attempt}: {action}", file=sys.stderr)
    return retry


if __name__ == "__main__":
    sys.exit(not should_requeue(int(sys.argv[1]), Path(sys.argv[2])))
