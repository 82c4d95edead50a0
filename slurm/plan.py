"""From a sweep to jobs: which tasks there are, what each waits for, which of them share an array."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgcc_dist.common.sweep_file import Sweep, SweepRun, SweepStep, slug
from mgcc_dist.slurm import resources
from mgcc_dist.slurm.resources import Resources

REPORT = "report"


@dataclass(frozen=True)
class Task:
    """One program to carry out: a step of `prepare`, a run, or the report."""

    name: str
    """its place in the sweep: "busi/u-net/seed_1-0c2f3a4b", "prepare/busi/ldm-denoiser-split_1", "report" """
    kind: str
    """tasks of one kind may share an array"""
    command: list[str]
    """the words after `python`"""
    folder: Path
    """where its attempts are counted"""
    makes: Path
    """the file that says that it is done"""
    resources: Resources
    after: tuple[str, ...] = ()
    """tasks that it waits for"""
    even_if_failed: bool = False
    """whether it starts even when one of those has failed"""
    run: SweepRun | None = None
    members: tuple["Task", ...] = ()
    """runs that share this task's GPU; it then has no command of its own"""

    @property
    def parts(self) -> tuple["Task", ...]:
        """Its members, or itself."""
        return self.members or (self,)

    @property
    def is_done(self) -> bool:
        return all(part.makes.is_file() for part in self.parts)


@dataclass(frozen=True)
class Job:
    """What one sbatch starts: a task, or an array of tasks with one dependency and the same resources."""

    name: str
    tasks: list[Task]
    after: tuple[str, ...] = ()
    """tasks that all of its own wait for"""
    matches: str = ""
    """name of an earlier job: member k waits for that one's member k (Slurm's aftercorr)"""

    @property
    def resources(self) -> Resources:
        return self.tasks[0].resources


def tasks_of(sweep: Sweep, path: Path, cluster: dict[str, Any], cluster_name: str) -> list[Task]:
    """All tasks of the sweep that `path` holds: steps, runs, report; each after those that it waits for.

    Raises:
        UserError: a resource is unknown or of a wrong kind.
    """

    def asked(command: list[str], place: str, keys: dict[str, Any]) -> Resources:
        layers = [("presets.yaml", resources.preset_defaults(command)), (cluster_name, cluster), (place, keys)]
        return resources.read(layers)

    tasks: list[Task] = []
    for step in sweep.steps:
        command, folder = step.command(), sweep.out / "prepare" / step.name
        task = Task(
            f"prepare/{step.name}",
            step.kind,
            command,
            folder,
            step.output,
            asked(command, f"{path}: prepare {step.name}", step.resources),
            needed(command, sweep.steps, step),
        )
        tasks.append(task)
    for run in sweep.runs:
        command = run.command()
        place = f"{path}: {run.row} on {run.dataset}"
        name = str(run.folder.relative_to(sweep.out))
        after = needed(command, sweep.steps)
        asks = asked(command, place, run.resources)
        tasks.append(Task(name, "runs", command, run.folder, run.folder / "result.json", asks, after, run=run))
    out = sweep.out / "report.html"
    command = ["-m", "mgcc_dist.report", "--sweep", str(path), "--out", str(out)]
    runs = tuple(task.name for task in tasks if task.run)
    asks = asked(command, "report", {})
    tasks.append(Task(REPORT, REPORT, command, sweep.out / REPORT, out, asks, runs, even_if_failed=True))
    return tasks


def needed(command: list[str], steps: list[SweepStep], step: SweepStep | None = None) -> tuple[str, ...]:
    """The tasks whose products a command names; `step` itself, if given, also waits for the one before it."""
    if not steps:
        return ()
    values = {Path(text) for word in command for text in re.split(r'[\s"=,\[\]]+', word) if text}
    names: dict[str, str] = {}  # (data set and) entry of `prepare` -> its last step
    earlier = steps[: steps.index(step)] if step else steps
    for each in earlier:
        if step and each.chain == step.chain:
            continue
        if each.output in values or values & set(each.output.parents):
            last = [other for other in steps if other.chain == each.chain][-1]
            names[each.chain] = f"prepare/{last.name}"
    if step and (before := [each for each in earlier if each.chain == step.chain]):
        return (f"prepare/{before[-1].name}",)
    return tuple(names.values())


def shared(tasks: list[Task]) -> list[Task]:
    """Runs of one shape that wait for the same, joined to tasks of `runs_per_gpu`; other tasks as they are."""
    alike: dict[tuple[str, tuple[str, ...]], list[Task]] = {}
    for task in tasks:
        if task.run and task.resources.runs_per_gpu > 1:
            alike.setdefault((repr(task.resources), task.after), []).append(task)
    joined: dict[str, Task | None] = {}
    for group in alike.values():
        size = group[0].resources.runs_per_gpu
        for first, *more in (group[i : i + size] for i in range(0, len(group), size)):
            members = (first, *more) if more else ()
            name = f"{first.name} and {len(more)} more" if more else first.name
            joined |= dict.fromkeys((task.name for task in more), None)
            joined[first.name] = replace(
                first, name=name, members=members, resources=first.resources.of_runs(1 + len(more))
            )
    kept = (joined.get(task.name, task) for task in tasks)
    return [task for task in kept if task]


def jobs_of(tasks: list[Task], waiting: Iterable[str], largest_array: int, prefix: str) -> list[Job]:
    """The fewest jobs that carry `tasks` out; `waiting` are other tasks, submitted earlier, that may be waited for."""
    present = {part.name for task in tasks for part in task.parts} | set(waiting)
    earlier: dict[str, set[str]] = {}  # all that a task waits for, and what that waits for
    for task in tasks:
        before = set(task.after).union(*(earlier.get(name, ()) for name in task.after))
        earlier |= dict.fromkeys((part.name for part in task.parts), before)
    groups: dict[tuple[str, str], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.kind, repr(task.resources)), []).append(task)
    jobs: list[Job] = []
    for (kind, _), members in groups.items():
        after = [_nearest([name for name in task.after if name in present], earlier) for task in members]
        matched = _matching(after, jobs) if 1 < len(members) <= largest_array else None
        by_dependency: dict[tuple[str, ...], list[Task]] = {}
        for task, names in zip(members, after, strict=True):
            by_dependency.setdefault(() if matched else names, []).append(task)
        for names, alike in by_dependency.items():
            for begin in range(0, len(alike), largest_array):
                name = f"{prefix}-{slug(kind)}-{len(jobs) + 1}"
                jobs.append(Job(name, alike[begin : begin + largest_array], names, matched or ""))
    return jobs


def dependency(job: Job, ids: Mapping[str, str], jobs: Mapping[str, str]) -> str | None:
    """Slurm's --dependency: `ids` has the job of each task ("12" or "12_3"), `jobs` that of each submitted job."""
    if job.matches:
        return f"aftercorr:{jobs[job.matches]}"
    if not job.after:
        return None
    waits = {ids[name] for name in job.after}
    whole: dict[str, set[str]] = {}
    for each in ids.values():
        whole.setdefault(each.partition("_")[0], set()).add(each)
    shortened = {base if whole[base] <= waits else each for each in waits for base in [each.partition("_")[0]]}
    kind = "afterany" if job.tasks[0].even_if_failed else "afterok"
    return ":".join([kind, *sorted(shortened, key=_number)])


def _nearest(names: list[str], earlier: Mapping[str, set[str]]) -> tuple[str, ...]:
    """Those of `names` that no other of them waits for: the others are over by then."""
    return tuple(name for name in names if not any(name in earlier.get(other, ()) for other in names))


def _matching(after: list[tuple[str, ...]], jobs: list[Job]) -> str | None:
    """Name of the job whose members are, one by one, what the members of another wait for."""
    return next((job.name for job in jobs if [(task.name,) for task in job.tasks] == after), None)


def _number(job: str) -> tuple[int, ...]:
    return tuple(int(part) for part in job.split("_"))
