"""Submitting: jobs into Slurm's queue by submitit, or one task after the other on this machine."""

import fcntl
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import submitit
from submitit.helpers import environment_variables
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string
from tqdm import tqdm

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.sweep_file import Sweep, slug
from mgcc_dist.slurm import cluster
from mgcc_dist.slurm.plan import REPORT, Job, Task, dependency, jobs_of
from mgcc_dist.slurm.shared import SharedPrograms
from mgcc_dist.slurm.status import Registry, State, last_words, logs_of, own
from mgcc_dist.slurm.task import ATTEMPTS, Program

LOCK = ".submitting"
"""holds the id of the process that submits the sweep, and is locked by it"""
NO_LIMIT = 10 * 365 * 24 * 60
"""minutes: the time limits of a cluster are not of this machine"""


def wanted(states: list[State], again: bool) -> list[Task]:
    """The tasks to start: those that never were and, with `again`, those that failed; the report after any run."""
    chosen: dict[str, Task] = {}
    dead = {state.task.name for state in states if state.kind == "failed" and not again}
    for state in states:
        task = state.task
        if task.name == REPORT:
            runs = any(each in chosen for each in task.after)
            if runs or state.kind == "missing" or (again and state.kind == "failed"):
                chosen[task.name] = task
        elif dead & set(task.after):
            dead.add(task.name)
        elif state.kind == "missing" or (again and state.kind == "failed"):
            chosen[task.name] = task
    return list(chosen.values())


def to_slurm(sweep: Sweep, tasks: list[Task], states: list[State], registry: Registry) -> list[Job]:
    """Submit `tasks`; each job's ids are in the registry before the next is submitted.

    Raises:
        UserError: Slurm would not start a job, or does not take it.
    """
    waiting = [state.task.name for state in states if state.kind in ("pending", "running")]
    jobs = jobs_of(tasks, waiting, cluster.largest_array(), sweep.name)
    for shape in {repr(job.resources): job for job in jobs}.values():
        cluster.check(shape.resources)
        cluster.check_script(script(shape, registry.logs, None))
    ids = registry.jobs = registry.jobs or {}
    numbers: dict[str, str] = {}
    for job in jobs:
        for part in (part for task in job.tasks for part in task.parts):
            (part.folder / ATTEMPTS).unlink(missing_ok=True)
        executor = SlurmExecutor(registry.logs, max_num_timeout=10_000)  # `attempts` is what ends a run
        executor.update_parameters(**parameters(job, registry.logs, dependency(job, ids, numbers)))
        try:
            submitted = executor.submit_array([program(task, registry.logs) for task in job.tasks])
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"Slurm did not take {job.name}: {' '.join(str(error).split())}") from error
        ids |= {part.name: j.job_id for task, j in zip(job.tasks, submitted, strict=True) for part in task.parts}
        numbers[job.name] = submitted[0].job_id.partition("_")[0]
        registry.save()
    return jobs


def locally(tasks: list[Task], registry: Registry, parallel: int) -> list[Task]:
    """Carry `tasks` out on this machine, `parallel` at a time, in order; those that failed are returned.

    Raises:
        KeyboardInterrupt: by Ctrl-C or `cancel`, once what was running has saved itself.
    """
    ids = registry.jobs = registry.jobs or {}
    open_, running, failed = list(tasks), dict[int, tuple[Task, Any]](), list[Task]()
    bar = tqdm(total=len(tasks), unit="task", desc="tasks", dynamic_ncols=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a shell's background jobs are deaf to SIGINT
    try:
        while open_ or running:
            for slot, (task, job) in list(running.items()):
                if job.done():
                    del running[slot]
                    bar.update()
                    for part in (part for part in task.parts if not part.is_done):
                        failed.append(part)
                        said = last_words(own(logs_of(registry).get(job.job_id, ()), part))
                        bar.write("\n    ".join([f"{part.name} failed", *said]))
            lost = {task.name for task in failed}
            for task in [task for task in open_ if lost & set(task.after) and not task.even_if_failed]:
                open_.remove(task)
                failed += task.parts
                lost |= {part.name for part in task.parts}
                bar.update()
                bar.write(f"{task.name} is left out: what it waits for failed")
            busy = [*open_, *(task for task, _ in running.values())]
            unfinished = {part.name for task in busy for part in task.parts}
            free = parallel - len(running)
            for task in [task for task in open_ if not unfinished & set(task.after)][:free]:
                open_.remove(task)
                slot = next(slot for slot in range(parallel) if slot not in running)
                for part in task.parts:
                    (part.folder / ATTEMPTS).unlink(missing_ok=True)
                job = _start_here(task, registry, slot)
                running[slot] = task, job
                ids |= dict.fromkeys((part.name for part in task.parts), job.job_id)
                registry.save()
            time.sleep(0.2)
    finally:
        signal.signal(signal.SIGTERM, before)
        for _, job in running.values():
            os.kill(int(job.job_id), signal.SIGTERM)  # handed on to the ranks, which save and end
        for _, job in running.values():
            job._process.wait()
        bar.close()
    return failed


def in_process(tasks: list[Task], registry: Registry) -> list[Task]:
    """Carry `tasks` out in this process, one after the other, for a debugger; an error ends it."""
    executor = submitit.DebugExecutor(registry.logs)
    for task in tasks:
        print(f"slurm: {task.name}", flush=True)
        (task.folder / ATTEMPTS).unlink(missing_ok=True)
        executor.submit(program(task, registry.logs)).result()
    return []


def program(task: Task, logs: Path) -> Program | SharedPrograms:
    parts = {
        slug(part.name): Program(part.command, part.folder, part.makes, part.resources.attempts) for part in task.parts
    }
    return SharedPrograms(parts, logs) if task.members else next(iter(parts.values()))


def parameters(job: Job, logs: Path, after: str | None) -> dict[str, Any]:
    """Of submitit's Slurm executor."""
    retry = f"{shlex.quote(sys.executable)} -m mgcc_dist.slurm.retry $code {shlex.quote(str(logs))}"
    settings = {**job.resources.sbatch(), "job_name": job.name, "teardown": ["code=$?", retry, "exit $code"]}
    return settings | ({"dependency": after} if after else {})


def script(job: Job, logs: Path, after: str | None) -> str:
    """The text that sbatch gets."""
    settings = parameters(job, logs, after)
    if len(job.tasks) > 1:
        settings["map_count"] = len(job.tasks)
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(logs))}"
    return _make_sbatch_string(command=command, folder=logs, **settings)


def describe(jobs: list[Job]) -> str:
    """Every job with its resources, what it waits for and its commands."""
    lines = []
    for job in jobs:
        many = f", array of {len(job.tasks)}, {min(len(job.tasks), job.resources.parallel)} at a time"
        lines.append(f"{job.name}: {job.resources}{many if len(job.tasks) > 1 else ''}")
        if job.matches:
            lines.append(f"  after {job.matches}, member by member")
        elif job.after:
            shown = ", ".join(job.after[:4]) + (f" and {len(job.after) - 4} more" if len(job.after) > 4 else "")
            lines.append(f"  after {shown}{', even if they fail' if job.tasks[0].even_if_failed else ''}")
        for task in job.tasks:
            lines += [f"  {task.name}: {len(task.members)} runs side by side"] if task.members else []
            lines += [f"  {part.name}: python {' '.join(part.command)}" for part in task.parts]
    return "\n".join(lines)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One submission of a sweep at a time.

    Raises:
        UserError: another is under way.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a+") as file:
        if not _lock(file):
            raise UserError(f"{out} is being submitted by another process; wait for it")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def stop_local(out: Path, jobs: list[str]) -> None:
    """End a sweep that runs on this machine: by the process that submits it or, if that is gone, its jobs.

    Not both: the second SIGTERM would end a run before it has saved itself.
    """
    with suppress(FileNotFoundError), (out / LOCK).open("a+") as file:
        if not _lock(file):
            file.seek(0)
            os.kill(int(file.read()), signal.SIGTERM)
            return
    for job in jobs:
        with suppress(ProcessLookupError):
            os.kill(int(job), signal.SIGTERM)


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def outdated(sweep: Sweep) -> list[str]:
    """A line for every run folder that an earlier config of a run has left."""
    lines = []
    wanted = {(run.folder.parent, run.seed): run.folder.name for run in sweep.runs}
    for parent in dict.fromkeys(run.folder.parent for run in sweep.runs):
        for folder in sorted(parent.glob("seed_*-*")):
            seed = folder.name.removeprefix("seed_").partition("-")[0]
            name = wanted.get((parent, int(seed))) if seed.isdigit() else None
            if name and name != folder.name:
                was = "finished" if (folder / "result.json").is_file() else "unfinished"
                lines.append(f"{folder}: {was}, of another config; it stays and does not count, {name} does")
    return lines


def _start_here(task: Task, registry: Registry, slot: int) -> Any:
    asks = task.resources
    executor = submitit.LocalExecutor(registry.logs)
    gpus = tuple(range(slot * asks.gpus, (slot + 1) * asks.gpus))
    executor.update_parameters(
        timeout_min=NO_LIMIT, tasks_per_node=asks.tasks_per_node, gpus_per_node=asks.gpus, visible_gpus=gpus
    )
    # Deaf to Ctrl-C, which a terminal sends to all: the ranks hear it themselves, and of `locally` by SIGTERM.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with environment_variables(**asks.environment):
            return executor.submit(program(task, registry.logs))
    finally:
        signal.signal(signal.SIGINT, before)
