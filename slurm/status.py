"""Where each task of a sweep stands, by its product, Slurm's queue, its metrics and log; quick, since without torch."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgcc_dist.common.files import read_json, write_json
from mgcc_dist.common.sweep_file import slug
from mgcc_dist.slurm import cluster
from mgcc_dist.slurm.plan import Task

ORDER = ("done", "running", "pending", "failed", "missing")
PROGRESS = re.compile(r"^.*?\d+%\|.*?\|.*?\[.*?\]")
"""a progress bar; an error may follow it on its line"""
TAIL = 4096
"""bytes at the end of a log or metrics file that are looked at"""


@dataclass
class Registry:
    """OUT/jobs.json: which job carries out which task, and where the sweep was submitted to."""

    path: Path
    cluster: str = "slurm"
    cluster_file: str | None = None
    jobs: dict[str, str] | None = None
    """task -> id of its latest job"""

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
class State:
    task: Task
    kind: str
    """one of ORDER"""
    job: str = ""
    note: str = ""
    """why it is pending, how it failed"""
    node: str = ""
    step: int | None = None
    epoch: float | None = None
    remaining: float | None = None
    """seconds to the end of training, at the pace so far"""


def states_of(tasks: Iterable[Task], registry: Registry) -> list[State]:
    """Asks Slurm once for what is queued and, if tasks have failed, once for how."""
    tasks, jobs = list(tasks), registry.jobs or {}
    submitted = [task for task in tasks if task.name in jobs and not task.is_done]
    queued: Mapping[str, cluster.Queued] = {}
    if submitted and registry.cluster == "slurm":
        queued = cluster.queue()
    elif submitted:
        ids = (jobs[task.name] for task in submitted)
        queued = {job: cluster.Queued("RUNNING", "", "") for job in ids if cluster.is_local_alive(job)}
    gone = [jobs[task.name] for task in submitted if jobs[task.name] not in queued]
    how = cluster.ended(gone) if registry.cluster == "slurm" else {}
    return [_state(task, jobs.get(task.name, ""), queued, how) for task in tasks]


def _state(task: Task, job: str, queued: Mapping[str, cluster.Queued], how: Mapping[str, str]) -> State:
    # Looked at anew: what left the queue since may have finished.
    entry = queued.get(job)
    if task.is_done and (task.run or not entry):  # a run's job may go on with others; a report is made again
        return State(task, "done", job)
    if not job:
        return State(task, "missing")
    if entry is None:
        return State(task, "failed", job, note=how.get(job, "").split(" ")[0].lower())
    if entry.state in ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING"):
        return State(task, "pending", job, note=entry.reason)
    return State(task, "running", job, node=entry.node, **progress(task))


def progress(task: Task) -> dict[str, Any]:
    """Step, epoch and remaining seconds of a task that trains, by its newest row of metrics; {} before the first."""
    rows = []
    for line in tail(task.makes.parent / "metrics.jsonl").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # cut short at either end
            continue
    timed = [row for row in rows if "seconds" in row]
    if not timed:
        return {}
    row = timed[-1]
    shown: dict[str, Any] = {"step": row["step"], "epoch": row["epoch"]}
    if task.run and (total := task.run.training_length()):
        unit, number = total
        done = row["epoch" if unit == "epochs" else "step"] / number
        shown["remaining"] = row["seconds"] * max(0, 1 - done) / done if done else None
    return shown


def tail(path: Path) -> str:
    """The last TAIL bytes of a text file; "" when it is not there."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return file.read().decode(errors="replace")


def logs_of(registry: Registry) -> dict[str, list[Path]]:
    """Log files by job, of all its ranks, standard output before standard error."""
    logs: dict[str, list[Path]] = {}
    for path in registry.logs.glob("*_log.*"):
        job = path.name.rpartition("_log.")[0].rpartition("_")[0]
        logs.setdefault(job, []).append(path)
    return {job: sorted(paths, key=lambda path: (path.suffix != ".out", path.name)) for job, paths in logs.items()}


def own(logs: Iterable[Path], task: Task) -> list[Path]:
    """Of the logs of a task's job those of the task: all, unless it is one of several runs that share the job."""
    logs = list(logs)
    return [path for path in logs if path.stem.endswith(f"_{slug(task.name)}_log")] or logs


def last_words(logs: Iterable[Path], lines: int = 3) -> list[str]:
    """The last lines that a failed job wrote to standard error; Slurm's own only where the program said nothing."""
    notes: list[str] = []
    for path in logs:
        if path.suffix != ".err":
            continue
        said = [words for line in tail(path).splitlines() if (words := PROGRESS.sub("", line).strip())]
        own = [line for line in said if not line.startswith(("srun:", "slurmstepd"))]
        if own:
            return own[-lines:]
        notes += said
    return notes[-lines:]


def table(states: list[State], registry: Registry) -> str:
    """One line a task, with the last words of those that failed, and a count."""
    rows = [["run", "state", "step", "epoch", "remaining", "node", "job", ""]]
    for state in states:
        step = "" if state.step is None else str(state.step)
        epoch = "" if state.epoch is None else f"{state.epoch:.1f}"
        remaining = "" if state.remaining is None else clock(state.remaining)
        rows.append([state.task.name, state.kind, step, epoch, remaining, state.node, state.job, state.note])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    shown, logs = lines[:1], logs_of(registry)
    for state, line in zip(states, lines[1:], strict=True):
        shown.append(line)
        if state.kind == "failed":
            shown += [f"    {words}" for words in last_words(own(logs.get(state.job, ()), state.task))]
    return "\n".join([*shown, summary(states)])


def summary(states: Iterable[State]) -> str:
    """`9 tasks: 6 done, 2 running, 1 failed`"""
    counts = Counter(state.kind for state in states)
    counted = ", ".join(f"{counts[kind]} {kind}" for kind in ORDER if counts[kind])
    return f"{counts.total()} tasks: {counted}"


def clock(seconds: float) -> str:
    """`3:05:00`"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def watch(tasks: list[Task], registry: Registry, seconds: float) -> list[State]:
    """Show the table again and again until nothing is pending or running; the last states."""
    while True:
        states = states_of(tasks, registry)
        print(f"\033[2J\033[H{table(states, registry)}", flush=True)
        if not any(state.kind in ("pending", "running") for state in states):
            return states
        time.sleep(seconds)
