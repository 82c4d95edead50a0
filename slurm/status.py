"""State of each task of a sweep, from its output, Slurm's queue, its metrics and its log. Does not import torch."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_json, write_json
from mgcc_dist.slurm import cluster
from mgcc_dist.slurm.job_graph import Task
from mgcc_dist.sweep.schema import slug
from mgcc_dist.train.heartbeat import describe_ranks, read_states
from mgcc_dist.train.stragglers import describe_rank, slow_rank

STATES = ("done", "running", "pending", "failed", "missing")
WAITING_STATES = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING")
"""Slurm's states of jobs that have not started"""
TAIL_BYTES = 4096
"""read from the end of a log or metrics file"""
NO_ANSWER, NO_PROGRESS = 300.0, 1800.0
"""seconds after which a run counts as stalled: no rank writes its heartbeat, or one stays in the same phase"""
COLUMNS = ("run", "state", "step", "epoch", "remaining", "node", "job", "reason")


@dataclass
class Registry:
    """OUT/jobs.json: the job of each task, and where the sweep was submitted to."""

    path: Path
    cluster: str = "slurm"
    cluster_file: str | None = None
    jobs: dict[str, str] | None = None
    """task name -> id of its latest job"""

    @classmethod
    def read(cls, out: Path) -> "Registry":
        path = out / "jobs.json"
        return cls(path, **read_json(path)) if path.is_file() else cls(path, jobs={})

    def save(self) -> None:
        write_json(self.path, {"cluster": self.cluster, "cluster_file": self.cluster_file, "jobs": self.jobs})

    @property
    def logs(self) -> Path:
        return (self.path.parent / "jobs").absolute()


@dataclass(frozen=True)
class TaskStatus:
    task: Task
    state: str
    """one of STATES"""
    job: str = ""
    reason: str = ""
    """why the task is pending, how it failed, that it is stalled, or which rank is slow"""
    node: str = ""
    step: int | None = None
    epoch: float | None = None
    remaining: float | None = None
    """estimated seconds until training ends"""


def query(tasks: Iterable[Task], registry: Registry) -> list[TaskStatus]:
    """Return the status of all tasks, with one call of squeue and, if tasks have failed, one of sacct."""
    tasks, jobs = list(tasks), registry.jobs or {}
    submitted = [task for task in tasks if task.name in jobs and not task.is_done]
    queued: Mapping[str, cluster.QueueEntry] = {}
    if submitted and registry.cluster == "slurm":
        queued = cluster.queue()
    elif submitted:
        ids = (jobs[task.name] for task in submitted)
        queued = {job: cluster.QueueEntry("RUNNING", "", "") for job in ids if cluster.is_local_job_running(job)}
    ended = [jobs[task.name] for task in submitted if jobs[task.name] not in queued]
    final_states = cluster.final_states(ended) if registry.cluster == "slurm" else {}
    return [_task_status(task, jobs.get(task.name, ""), queued, final_states) for task in tasks]


def _task_status(
    task: Task, job: str, queued: Mapping[str, cluster.QueueEntry], final_states: Mapping[str, str]
) -> TaskStatus:
    entry = queued.get(job)
    # Check the output again: a task that has left the queue since may have finished. The job of a finished run can
    # still be running packed runs, but a report with a job in the queue is being rebuilt.
    if task.is_done and (task.run or not entry):
        return TaskStatus(task, "done", job)
    if not job:
        return TaskStatus(task, "missing")
    if entry is None:
        return TaskStatus(task, "failed", job, reason=final_states.get(job, "").split(" ")[0].lower())
    if entry.state in WAITING_STATES:
        return TaskStatus(task, "pending", job, reason=entry.reason)
    row = latest_timed_row(task.output.parent)
    reason = stalled(task.output.parent) or held_up(row)
    return TaskStatus(task, "running", job, reason, entry.node, **progress(task, row))


def stalled(run: Path) -> str:
    """Return which rank of a run no longer moves, as `stalled: rank 1 ...`; "" if all do, or there is one rank."""
    states = read_states(run)
    if not states:
        return ""
    now, last = time.time(), max(state.written for state in states)
    if now - last > NO_ANSWER:
        return f"stalled: no rank has answered for {format_duration(now - last)}"
    slow = now - min(state.since for state in states) > NO_PROGRESS
    return f"stalled: {describe_ranks(states, own=-1)}" if slow else ""


def held_up(row: dict[str, Any]) -> str:
    """Return which rank the others wait for, as `slow: rank 1 ...`; "" if none, or with one rank."""
    stragglers = row.get("stragglers")
    slow = slow_rank(stragglers) if stragglers else None
    return f"slow: {describe_rank(slow, stragglers['median_seconds'])}" if slow and stragglers else ""


def latest_timed_row(run: Path) -> dict[str, Any]:
    """Return the latest row of training metrics; {} before the first."""
    for line in reversed(read_tail(run / "metrics.jsonl").splitlines()):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the first and the last line may be incomplete
            continue
        if "seconds" in row:
            return row
    return {}


def progress(task: Task, row: dict[str, Any]) -> dict[str, Any]:
    """Return step, epoch and remaining seconds of a training task at its latest row; {} before the first."""
    if not row:
        return {}
    found: dict[str, Any] = {"step": row["step"], "epoch": row["epoch"]}
    if task.run:
        unit, total = task.run.training_length()
        fraction = row["epoch" if unit == "epochs" else "step"] / total
        found["remaining"] = row["seconds"] * max(0, 1 - fraction) / fraction if fraction else None
    return found


def read_tail(path: Path) -> str:
    """Return the last TAIL_BYTES of a text file; "" if the file does not exist."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def find_logs(registry: Registry) -> dict[str, list[Path]]:
    """Return the log files of all ranks by job, standard output before standard error."""
    logs: dict[str, list[Path]] = {}
    for path in registry.logs.glob("*_log.*"):
        job = path.name.rpartition("_log.")[0].rpartition("_")[0]
        logs.setdefault(job, []).append(path)
    return {job: sorted(paths, key=lambda path: (path.suffix != ".out", path.name)) for job, paths in logs.items()}


def select_logs(job_logs: Iterable[Path], task: Task) -> list[Path]:
    """Return the task's logs among its job's: the log of a packed run, otherwise all."""
    job_logs = list(job_logs)
    return [path for path in job_logs if path.stem.endswith(f"_{slug(task.name)}_log")] or job_logs


def final_log_lines(logs: Iterable[Path], count: int = 3) -> list[str]:
    """Return the last lines of standard error; Slurm's own messages only if the program wrote nothing."""
    from_slurm: list[str] = []
    for path in logs:
        if path.suffix != ".err":
            continue
        lines = [text for line in read_tail(path).splitlines() if (text := line.strip())]
        from_program = [line for line in lines if not line.startswith(("srun:", "slurmstepd"))]
        if from_program:
            return from_program[-count:]
        from_slurm += lines
    return from_slurm[-count:]


def format_table(statuses: list[TaskStatus], registry: Registry) -> str:
    """Format one line per task, with the final log lines of failed ones, and a summary."""
    rows = [
        [
            status.task.name,
            status.state,
            "" if status.step is None else str(status.step),
            "" if status.epoch is None else f"{status.epoch:.1f}",
            "" if status.remaining is None else format_duration(status.remaining),
            *(status.node, status.job, status.reason),
        ]
        for status in statuses
    ]
    align = ("left", "left", "right", "right", "right", "left", "left", "left")
    table = tabulate(rows, COLUMNS, tablefmt="plain", colalign=align, disable_numparse=True)
    header, *task_lines = (line.rstrip() for line in table.splitlines())
    lines, logs = [header], find_logs(registry)
    for status, task_line in zip(statuses, task_lines, strict=True):
        lines.append(task_line)
        if status.state == "failed":
            lines += [f"    {line}" for line in final_log_lines(select_logs(logs.get(status.job, ()), status.task))]
    return "\n".join([*lines, summarize(statuses)])


def summarize(statuses: Iterable[TaskStatus]) -> str:
    """Return `9 tasks: 6 done, 2 running, 1 failed`."""
    counts = Counter(status.state for status in statuses)
    per_state = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return f"{counts.total()} tasks: {per_state}"


def format_duration(seconds: float) -> str:
    """Format seconds as `3:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def watch(tasks: list[Task], registry: Registry, interval: float) -> list[TaskStatus]:
    """Print the table every `interval` seconds until no task is pending or running; return the last statuses.

    Raises:
        UserError: Slurm does not answer the first time. Later it may be restarting.
    """
    statuses = query(tasks, registry)
    while True:
        print(f"\033[2J\033[H{format_table(statuses, registry)}", flush=True)
        if not any(status.state in ("pending", "running") for status in statuses):
            return statuses
        time.sleep(interval)
        try:
            statuses = query(tasks, registry)
        except UserError as error:
            print(f"slurm: {error}. Asking again in {interval:g} seconds.", flush=True)
