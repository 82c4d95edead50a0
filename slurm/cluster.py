"""What Slurm says of itself and of jobs."""

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.slurm.resources import Resources, minutes


@dataclass(frozen=True)
class Queued:
    state: str
    """PENDING, RUNNING, REQUEUED, ..."""
    node: str
    reason: str
    """why it is pending"""


def queue() -> dict[str, Queued]:
    """This user's jobs that are not over, each array member by itself, by id: "12", "13_0"."""
    lines = _output("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%N|%r").splitlines()
    rows = (line.split("|") for line in lines)
    return {job: Queued(state, node, reason) for job, state, node, reason in rows}


def ended(jobs: Iterable[str]) -> dict[str, str]:
    """State of jobs that are over ("FAILED", "CANCELLED by 0", "NODE_FAIL", ...); empty without accounting."""
    jobs = list(jobs)
    if not jobs:
        return {}
    bases = sorted({job.partition("_")[0] for job in jobs})
    try:
        text = _output(
            "sacct", "--noheader", "--allocations", "--parsable2", "-o", "JobID,State", "-j", ",".join(bases)
        )
    except UserError:
        return {}
    return dict(line.split("|") for line in text.splitlines() if "|" in line)


def cancel(jobs: list[str]) -> None:
    """End jobs, pending or running."""
    _output("scancel", *jobs)


def requeue(job: str) -> None:
    """Put a running job back into the queue."""
    _output("scontrol", "requeue", job)


def is_this_job_running() -> bool:
    """Whether this process is in a job that Slurm neither ends (scancel, the time limit) nor has requeued."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return False
    return "JobState=RUNNING" in _output("scontrol", "show", "job", "-o", job)


def largest_array() -> int:
    """How many members an array may have."""
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", _output("scontrol", "show", "config"))
    return int(match.group(1)) if match else 1000


def check(wanted: Resources) -> None:
    """Raise UserError where the partition is not there or ends jobs sooner than asked for."""
    shown = [_pairs(line) for line in _output("scontrol", "show", "partition", "-o").splitlines()]
    partitions = {each["PartitionName"]: each for each in shown}
    name = wanted.partition or next((key for key, each in partitions.items() if each.get("Default") == "YES"), None)
    if name is None:
        raise UserError(f"no partition is the default; give one of {', '.join(partitions)} in a cluster file")
    for each in name.split(","):
        if each not in partitions:
            raise UserError(f"partition {each!r} is not known to Slurm; there are {', '.join(partitions)}")
        limit = partitions[each].get("MaxTime", "UNLIMITED")
        if limit != "UNLIMITED" and wanted.minutes > minutes(limit):
            raise UserError(f"time {wanted.time} is over the limit {limit} of partition {each}")


def check_script(text: str) -> None:
    """Raise UserError with Slurm's words where it would never start a job of this script."""
    tested = subprocess.run(
        ["sbatch", "--test-only"], input=text, capture_output=True, text=True, check=False, timeout=60
    )
    if tested.returncode:
        said = " ".join(tested.stderr.split())
        raise UserError(f"Slurm would not take the job: {said.removeprefix('allocation failure: ')}")


def is_local_alive(pid: str) -> bool:
    """Whether submitit's controller of a local job is running on this machine."""
    try:
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _output(*command: str) -> str:
    """Standard output of one of Slurm's commands.

    Raises:
        UserError: it is not installed, fails, or takes more than a minute.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=os.environ)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not there: is this a Slurm cluster? --cluster local needs none") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} gave no answer within a minute; is slurmctld up?") from error
    if done.returncode:
        raise UserError(f"{' '.join(command[:3])}: {' '.join(done.stderr.split())}")
    return done.stdout


def _pairs(line: str) -> dict[str, str]:
    """`Key=value Key=value` as scontrol -o prints it."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)
