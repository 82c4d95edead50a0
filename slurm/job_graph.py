"""Build a sweep's task graph and group the tasks into Slurm jobs and job arrays."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgcc_dist.common.components import import_options
from mgcc_dist.common.config import as_yaml
from mgcc_dist.common.files import write_text
from mgcc_dist.slurm.resources import Resources, merge_resources, program_defaults
from mgcc_dist.sweep.expansion import Sweep
from mgcc_dist.sweep.runs import SweepRun
from mgcc_dist.sweep.schema import slug
from mgcc_dist.sweep.steps import SweepStep

REPORT = "report"
CONFIGS = "configs"
"""folder in a sweep's `out` with the config file of each submitted step and run"""
WRITERS = 16


@dataclass(frozen=True)
class Task:
    """A node of the task graph: a preparation step, a run, several packed runs, or the report."""

    name: str
    """unique in the sweep: "busi/u-net/seed_1-0c2f3a4b", "prepare/busi/ldm-denoiser-split_1", "report", ..."""
    kind: str
    """only tasks of the same kind share an array"""
    command: list[str]
    """arguments after `python`"""
    folder: Path
    """holds the file that counts the attempts"""
    output: Path
    """the file whose existence marks the task as done"""
    resources: Resources
    depends_on: tuple[str, ...] = ()
    """names of other tasks"""
    after_any: bool = False
    """start even if a dependency failed (Slurm's afterany)"""
    source: SweepRun | SweepStep | None = None
    """what the command starts, if its config is in a file"""
    config_file: Path | None = None
    """file in the command, written by `write_configs`"""
    base: Any = None
    """config that the command changes, if it does not come from a source"""
    packed: tuple["Task", ...] = ()
    """runs that share this task's GPU; the task then has no command of its own"""

    @property
    def subtasks(self) -> tuple["Task", ...]:
        """The packed runs, or the task itself."""
        return self.packed or (self,)

    @property
    def readable_command(self) -> list[str]:
        """The command as a person would type it, without a config file."""
        return self.source.command() if self.source else self.command

    @property
    def config(self) -> Any:
        """The config of its program, which names the files that it reads; None if it has none."""
        return self.source.config if self.source else self.base

    @property
    def run(self) -> SweepRun | None:
        return self.source if isinstance(self.source, SweepRun) else None

    @property
    def is_done(self) -> bool:
        return all(subtask.output.is_file() for subtask in self.subtasks)


@dataclass(frozen=True)
class Job:
    """One call of sbatch: a task, or an array of tasks with the same dependencies and resources."""

    name: str
    tasks: list[Task]
    depends_on: tuple[str, ...] = ()
    """names of tasks that all tasks of this job depend on"""
    corresponds_to: str = ""
    """name of an earlier job: array task k depends on that job's array task k (Slurm's aftercorr)"""

    @property
    def resources(self) -> Resources:
        return self.tasks[0].resources


def build_tasks(sweep: Sweep, cluster: dict[str, Any], cluster_name: str) -> list[Task]:
    """Build all tasks of a sweep: steps, runs and report, each after its dependencies.

    Raises:
        UserError: a resource is unknown or has a value of the wrong type.
    """

    def resources(defaults: dict[str, Any], source: str, keys: dict[str, Any]) -> Resources:
        return merge_resources([("presets.yaml", defaults), (cluster_name, cluster), (source, keys)])

    tasks: list[Task] = []
    for step in sweep.steps:
        name = f"prepare/{step.name}"
        config_file = sweep.out / CONFIGS / f"{name}.yaml"
        defaults = program_defaults(step.program.words[0], step.program.preset)
        tasks.append(
            Task(
                name=name,
                kind=step.kind,
                command=step.program.command(["--config", str(config_file)]),
                folder=sweep.out / name,
                output=step.output,
                resources=resources(defaults, f"{sweep.path}: prepare {step.name}", step.resources),
                depends_on=_prepared(step.needs),
                source=step,
                config_file=config_file,
            )
        )
    for run in sweep.runs:
        name = str(run.folder.relative_to(sweep.out))
        config_file = sweep.out / CONFIGS / f"{name}.yaml"
        tasks.append(
            Task(
                name=name,
                kind="runs",
                command=["-m", "mgcc_dist.segment", "--config", str(config_file)],
                folder=run.folder,
                output=run.folder / "result.json",
                resources=resources(
                    program_defaults("segment", run.preset), f"{sweep.path}: {run.row} on {run.dataset}", run.resources
                ),
                depends_on=_prepared(run.needs),
                source=run,
                config_file=config_file,
            )
        )
    if search := sweep.search:
        for worker in range(search.config.workers):
            tasks.append(
                Task(
                    name=f"search/worker_{worker}",
                    kind="search",
                    command=[*search.command(), "--worker", str(worker)],
                    folder=search.folder / f"worker_{worker}",
                    output=search.marker(worker),
                    resources=resources(
                        program_defaults("segment", search.preset), f"{sweep.path}: search", search.resources
                    ),
                    depends_on=_prepared(search.needs),
                    base=search.base,
                )
            )
    if not sweep.runs:
        return tasks
    page = sweep.out / "report.html"
    report = Task(
        name=REPORT,
        kind=REPORT,
        command=["-m", "mgcc_dist.report", *import_options(), "--sweep", str(sweep.path), "--out", str(page)],
        folder=sweep.out / REPORT,
        output=page,
        resources=resources(program_defaults("report"), "report", {}),
        depends_on=tuple(task.name for task in tasks if task.run),
        after_any=True,
    )
    return [*tasks, report]


def _prepared(steps: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"prepare/{name}" for name in steps)


def write_configs(tasks: Iterable[Task]) -> list[Path]:
    """Write the config files of steps and runs; return those that did not exist."""
    subtasks = (subtask for task in tasks for subtask in task.subtasks)
    texts = {each.config_file: as_yaml(each.source.config) for each in subtasks if each.config_file and each.source}
    created = {path: None for path in texts if not path.is_file()}
    changed = [path for path, text in texts.items() if path in created or path.read_text() != text]
    with ThreadPoolExecutor(WRITERS) as pool:  # each write waits for the disk
        list(pool.map(lambda path: write_text(path, texts[path]), changed))
    return list(created)


def pack_runs(tasks: list[Task]) -> list[Task]:
    """Pack runs with equal resources and dependencies into tasks of `runs_per_gpu` runs; keep other tasks."""
    packable: dict[tuple[str, tuple[str, ...]], list[Task]] = {}
    for task in tasks:
        if task.run and task.resources.runs_per_gpu > 1:
            packable.setdefault((repr(task.resources), task.depends_on), []).append(task)
    replacements: dict[str, Task | None] = {}
    for group in packable.values():
        size = group[0].resources.runs_per_gpu
        for first, *more in (group[i : i + size] for i in range(0, len(group), size)):
            replacements |= dict.fromkeys((task.name for task in more), None)
            replacements[first.name] = replace(
                first,
                name=f"{first.name} and {len(more)} more" if more else first.name,
                packed=(first, *more) if more else (),
                resources=first.resources.for_packed_runs(1 + len(more)),
            )
    return [packed for task in tasks if (packed := replacements.get(task.name, task))]


def build_jobs(tasks: list[Task], waiting: Iterable[str], max_array_size: int, prefix: str) -> list[Job]:
    """Group `tasks` into as few jobs as possible; tasks can also depend on `waiting`, which were submitted earlier."""
    present = {subtask.name for task in tasks for subtask in task.subtasks} | set(waiting)
    ancestors: dict[str, set[str]] = {}  # direct and indirect dependencies
    for task in tasks:
        indirect = set(task.depends_on).union(*(ancestors.get(name, ()) for name in task.depends_on))
        ancestors |= dict.fromkeys((subtask.name for subtask in task.subtasks), indirect)
    groups: dict[tuple[str, str], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.kind, repr(task.resources)), []).append(task)
    jobs: list[Job] = []
    for (kind, _), members in groups.items():
        direct = [_reduce([name for name in task.depends_on if name in present], ancestors) for task in members]
        corresponding = _corresponding_job(direct, jobs) if 1 < len(members) <= max_array_size else None
        by_dependencies: dict[tuple[str, ...], list[Task]] = {}
        for task, names in zip(members, direct, strict=True):
            by_dependencies.setdefault(() if corresponding else names, []).append(task)
        for names, array in by_dependencies.items():
            for start in range(0, len(array), max_array_size):
                name = f"{prefix}-{slug(kind)}-{len(jobs) + 1}"
                jobs.append(Job(name, array[start : start + max_array_size], names, corresponding or ""))
    return jobs


def dependency_option(job: Job, task_ids: Mapping[str, str], job_ids: Mapping[str, str]) -> str | None:
    """Return sbatch's --dependency.

    Args:
        task_ids: task name -> Slurm id of the job or array task that runs it: "12" or "12_3"
        job_ids: name of a submitted job -> its Slurm id
    """
    if job.corresponds_to:
        return f"aftercorr:{job_ids[job.corresponds_to]}"
    if not job.depends_on:
        return None
    needed = {task_ids[name] for name in job.depends_on}
    arrays: dict[str, set[str]] = {}
    for task_id in task_ids.values():
        arrays.setdefault(task_id.partition("_")[0], set()).add(task_id)
    # Name an array by its base id if all its tasks are needed.
    shortened = {base if arrays[base] <= needed else each for each in needed for base in [each.partition("_")[0]]}
    kind = "afterany" if job.tasks[0].after_any else "afterok"
    return ":".join([kind, *sorted(shortened, key=_sort_key)])


def _reduce(names: list[str], ancestors: Mapping[str, set[str]]) -> tuple[str, ...]:
    """Drop dependencies that another of `names` already depends on (transitive reduction)."""
    indirect = set[str]().union(*(ancestors.get(name, ()) for name in names))
    return tuple(name for name in names if name not in indirect)


def _corresponding_job(dependencies: list[tuple[str, ...]], jobs: list[Job]) -> str | None:
    """Return the name of the job whose k-th task is the only dependency of the k-th of these tasks, if any."""
    return next((job.name for job in jobs if [(task.name,) for task in job.tasks] == dependencies), None)


def _sort_key(task_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in task_id.removeprefix("JOB").split("_"))
