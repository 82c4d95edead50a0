"""The batch script of a job: what sbatch gets, how Python starts on the nodes, when the job is requeued."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from submitit.helpers import clean_env, environment_variables
from submitit.slurm.slurm import _make_sbatch_string

from mgcc_dist.common.config import as_plain
from mgcc_dist.common.errors import UserError
from mgcc_dist.slurm.container import existing_folders
from mgcc_dist.slurm.job_graph import Job
from mgcc_dist.slurm.worker import ATTEMPTS_FILE

CONTROLLER_TRIES = 60
"""calls of scontrol, ten seconds apart, until slurmctld answers"""


def batch_parameters(job: Job, logs: Path, dependency: str | None, python: str) -> dict[str, Any]:
    """Return the parameters of submitit's SlurmExecutor for a job.

    Args:
        python: shell words that start Python, from `python_words`

    Raises:
        UserError: submitit would replace a part of the log folder's name.
    """
    if tag := next((tag for tag in ("%A", "%a", "%j", "%t") if tag in str(logs)), None):
        raise UserError(f"out: submitit would replace {tag} in {logs}. Choose an output folder without {tag}.")
    if container := job.resources.container:
        python = container.python_in_batch_script(python)
    retry = f"{python} -m mgcc_dist.slurm.retry $code {shlex.quote(str(logs))}"
    parameters = job.resources.executor_parameters()
    teardown = ["code=$?", *job.resources.teardown_lines(), *requeue_lines(retry), "exit $code"]
    parameters |= {"job_name": job.name, "teardown": teardown}
    if dependency:
        parameters["dependency"] = dependency
    if "%" in str(logs):  # which Slurm expands in names of log files
        job_id = "%A_%a" if len(job.tasks) > 1 else "%j"
        pattern = f"{str(logs).replace('%', '%%')}/{job_id}_{{rank}}_log."
        batch, ranks = pattern.format(rank="0"), pattern.format(rank="%t")
        parameters["additional_parameters"] |= {"output": f"{batch}out", "error": f"{batch}err"}
        parameters["srun_args"] += ["--output", f"{ranks}out", "--error", f"{ranks}err"]  # the last one counts
    return parameters


def python_words(job: Job, logs: Path) -> str:
    """Return the shell words that start Python on the nodes, in the job's container if it has one."""
    container, subtasks = job.resources.container, [subtask for task in job.tasks for subtask in task.subtasks]
    if not container:
        return shlex.quote(sys.executable)
    settings = {id(each.config): as_plain(each.config) for each in subtasks if each.config}
    values = [*settings.values(), *(each.command for each in subtasks)]
    outputs = [path for each in subtasks for path in (each.output, each.folder / ATTEMPTS_FILE)]
    folders = existing_folders(values, [*outputs, logs / "log"]) | {Path.cwd()}
    return container.python(folders, job.resources.scratch, gpus=job.resources.gpu_count > 0)


def requeue_lines(retry: str) -> list[str]:
    """Return the shell lines that requeue a job which has not finished, unless Slurm has done so or is ending it.

    Args:
        retry: command that decides
    """
    return [
        # Not SLURM_JOB_ID, which for one task of an array is the id of the array.
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}",
        # slurmctld may be restarting: without an answer the job would end here and never be requeued.
        f'ask() {{ local i; for i in {{1..{CONTROLLER_TRIES}}}; do answer=$(scontrol "$@" 2>&1) && break; '
        '[[ $answer == *"contact slurm controller"* ]] || break; sleep 10; done; }',
        # Slurm may have taken this node for dead and restarted the job elsewhere, which must not be requeued then.
        'is_running() { ask show job -o "$job"; '
        '[[ $answer == *" JobState=RUNNING "* && $answer == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; }',
        f'if ((code)) && is_running && {retry} && is_running; then ask requeue "$job"; '
        '[[ ! $answer ]] || echo "slurm: not requeued: $answer" >&2; fi',
    ]


def batch_script(job: Job, logs: Path, dependency: str | None) -> str:
    """Return the batch script that `submit_job` submits. Needs no Slurm, unlike submitit's executor."""
    python = python_words(job, logs)
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(logs))}"
    count = len(job.tasks) if len(job.tasks) > 1 else None
    return _make_sbatch_string(command, logs, map_count=count, **batch_parameters(job, logs, dependency, python))


@contextmanager
def outside_job() -> Iterator[None]:
    """Hide the variables of the job that this process runs in, if any. sbatch and srun would take them as options."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    kept = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
    with clean_env(), environment_variables(**kept):
        yield
