"""Query Slurm and control jobs with its command-line tools."""

import logging
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.slurm.resources import Resources, to_minutes

logger = logging.getLogger(__name__)

DEFAULT_MAX_ARRAY_SIZE = 1000
"""used where Slurm does not say"""


@dataclass(frozen=True)
class QueueEntry:
    state: str
    """PENDING, RUNNING, REQUEUED, ..."""
    node: str
    reason: str
    """why the job is pending"""


def queue() -> dict[str, QueueEntry]:
    """Return this user's jobs in the queue by id, one entry per array task: "12", "13_0"."""
    lines = run("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%N|%r").splitlines()
    rows = (line.split("|") for line in lines)
    return {job: QueueEntry(state, node, reason) for job, state, node, reason in rows}


def final_states(jobs: Iterable[str]) -> dict[str, str]:
    """Return the states of finished jobs ("FAILED", "CANCELLED by 0", "NODE_FAIL", ...); {} without accounting.

    Warn if the site has accounting but it does not answer.
    """
    jobs = list(jobs)
    if not jobs:
        return {}
    job_ids = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    try:
        text = run("sacct", "--noheader", "--allocations", "--parsable2", "-o", "JobID,State", "-j", job_ids)
    except UserError as error:
        if "accounting storage is disabled" not in str(error):
            reason = str(error).rpartition("error: ")[2]
            logger.warning("slurm: sacct does not answer (%s), so how jobs have failed is not shown", reason)
        return {}
    return dict(line.split("|") for line in text.splitlines() if "|" in line)


def cancel(jobs: list[str]) -> None:
    """Cancel pending and running jobs."""
    run("scancel", *jobs)


def settings() -> dict[str, str]:
    """Return slurm.conf as the controller has it."""
    lines = (line.partition("=") for line in run("scontrol", "show", "config").splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def max_array_size() -> int:
    """Return the largest number of tasks that the site allows in a job array."""
    return int(settings().get("MaxArraySize", DEFAULT_MAX_ARRAY_SIZE))


def partitions() -> dict[str, dict[str, str]]:
    """Return what `scontrol show partition` says about each partition."""
    lines = [_parse_pairs(line) for line in run("scontrol", "show", "partition", "-o").splitlines()]
    return {pairs["PartitionName"]: pairs for pairs in lines}


def check_partition(requested: Resources) -> list[str]:
    """Return the partitions that a job goes to.

    Raises:
        UserError: a partition does not exist or its time limit is below the requested time.
    """
    existing = partitions()
    known = ", ".join(existing)
    default = next((name for name, pairs in existing.items() if pairs.get("Default") == "YES"), None)
    names = requested.partition or default
    if names is None:
        raise UserError(f"partition: this cluster has no default. Set one of {known} in a cluster file.")
    for name in names.split(","):
        if name not in existing:
            raise UserError(f"partition: {name!r} does not exist. Choose from: {known}.")
        limit = existing[name].get("MaxTime", "UNLIMITED")
        if limit != "UNLIMITED" and requested.minutes > to_minutes(limit):
            raise UserError(f"time: {requested.time} exceeds the limit {limit} of partition {name}")
    return names.split(",")


def check_accepted(requested: Resources) -> None:
    """Raise UserError with Slurm's message if `sbatch --test-only` rejects a job with these resources."""
    command = ["sbatch", "--test-only", *requested.sbatch_options(), "--wrap=true"]
    tested = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if tested.returncode:
        message = " ".join(tested.stderr.split()).removeprefix("allocation failure: ")
        raise UserError(f"Slurm rejects the resources ({requested}): {message}")


def is_local_job_running(pid: str) -> bool:
    """Return whether submitit's controller process of a local job is running on this machine."""
    try:
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def run(*command: str) -> str:
    """Run a Slurm command and return its standard output.

    Raises:
        UserError: the command is not installed, fails, or takes longer than a minute.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=os.environ)
    except FileNotFoundError as error:
        message = "command not found. Run on a Slurm login node, or use --cluster local, which needs no Slurm."
        raise UserError(f"{command[0]}: {message}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]}: no answer within a minute. Check that slurmctld is up.") from error
    if done.returncode:
        raise UserError(f"{' '.join(command[:3])}: {' '.join(done.stderr.split())}")
    return done.stdout


def _parse_pairs(line: str) -> dict[str, str]:
    """Parse a line of `Key=value Key=value`, as `scontrol -o` prints it."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)
