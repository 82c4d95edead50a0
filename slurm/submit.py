"""Submit a sweep's jobs to Slurm with submitit, or run its tasks on this machine."""

import fcntl
import logging
import os
import re
import shlex
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.slurm import cluster
from mgcc_dist.slurm.job_graph import REPORT, Job, Task, build_jobs, dependency_option, write_configs
from mgcc_dist.slurm.status import Registry, TaskStatus, final_log_lines, find_logs, select_logs
from mgcc_dist.sweep.expansion import Sweep
from mgcc_dist.sweep.schema import slug

try:
    import submitit
    from submitit.helpers import environment_variables

    from mgcc_dist.slurm.batch import batch_parameters, batch_script, outside_job, python_words
    from mgcc_dist.slurm.packing import PackedPrograms
    from mgcc_dist.slurm.worker import ATTEMPTS_FILE, Program
except ModuleNotFoundError as error:
    if error.name != "submitit":
        raise
    raise UserError("submitit is not installed. Run `pip install 'mgcc-dist[slurm]'`.") from error

logger = logging.getLogger(__name__)

LOCK = ".submitting"
"""holds the id of the process that submits the sweep, which also locks it"""
NO_TIME_LIMIT = 10 * 365 * 24 * 60
"""minutes; a cluster's time limits do not apply to this machine"""
POLL_SECONDS = 0.2


def select_tasks(statuses: list[TaskStatus], retry_failed: bool) -> list[Task]:
    """Return the tasks to start: missing ones and, with `retry_failed`, failed ones; the report after any run."""
    selected: dict[str, Task] = {}
    blocked = {status.task.name for status in statuses if status.state == "failed" and not retry_failed}
    for status in statuses:
        task = status.task
        is_startable = status.state == "missing" or (retry_failed and status.state == "failed")
        if task.name == REPORT:
            if is_startable or any(name in selected for name in task.depends_on):
                selected[task.name] = task
        elif blocked & set(task.depends_on):
            blocked.add(task.name)
        elif is_startable:
            selected[task.name] = task
    return list(selected.values())


def within_limit(tasks: list[Task]) -> list[Task]:
    """Return those of `tasks`, which are in the order of their dependencies, that fit into the queue now."""
    limits = [task.resources.max_submitted for task in tasks if task.resources.max_submitted]
    return tasks[: max(0, min(limits) - len(cluster.queue()))] if limits else tasks


def check_jobs(jobs: list[Job]) -> None:
    """Ask Slurm whether it would accept these jobs.

    Raises:
        UserError: it would reject one.
    """
    with outside_job():
        for requested in {repr(job.resources): job.resources for job in jobs}.values():
            cluster.check_partition(requested)
            cluster.check_accepted(requested)


def check_containers(tasks: Iterable[Task]) -> None:
    """Check the containers of tasks as far as this machine can.

    Raises:
        UserError: an image does not exist.
    """
    containers = {task.resources.container: None for task in tasks if task.resources.container}
    warnings = {line: None for container in containers for line in container.check()}
    for line in warnings:
        logger.warning("slurm: %s", line)


def submit_to_slurm(sweep: Sweep, tasks: list[Task], statuses: list[TaskStatus], registry: Registry) -> list[Job]:
    """Submit `tasks`; the ids of each job are saved in the registry before the next job is submitted.

    Raises:
        UserError: Slurm rejects a job. Jobs of this call that it accepted earlier are cancelled.
    """
    waiting = [status.task.name for status in statuses if status.state in ("pending", "running")]
    jobs = build_jobs(tasks, waiting, cluster.max_array_size(), sweep.name)
    check_jobs(jobs)
    saved, previous = registry.path.is_file(), dict(registry.jobs or {})
    job_ids: dict[str, str] = {}
    configs = write_configs(tasks)
    try:
        _submit_jobs(jobs, registry, job_ids)
    except UserError:
        if job_ids:
            cluster.cancel(list(job_ids.values()))
            registry.jobs = previous
            if saved:
                registry.save()
            else:
                registry.path.unlink(missing_ok=True)
        _remove_submission_files(registry.logs, job_ids.values())
        _remove(configs, sweep.out)
        raise
    return jobs


def _submit_jobs(jobs: list[Job], registry: Registry, job_ids: dict[str, str]) -> None:
    task_ids = registry.jobs = registry.jobs or {}
    for job in jobs:
        for subtask in (subtask for task in job.tasks for subtask in task.subtasks):
            (subtask.folder / ATTEMPTS_FILE).unlink(missing_ok=True)
        submitted = submit_job(job, registry.logs, dependency_option(job, task_ids, job_ids))
        for task, task_id in zip(job.tasks, submitted, strict=True):
            task_ids |= dict.fromkeys((subtask.name for subtask in task.subtasks), task_id)
        job_ids[job.name] = submitted[0].partition("_")[0]
        registry.save()


def _remove_submission_files(logs: Path, jobs: Iterable[str]) -> None:
    """Delete submitit's files of jobs that were not submitted, and of cancelled `jobs`."""
    for path in list(logs.glob("*")):
        unsubmitted = re.fullmatch(r"[0-9a-f]{32}\.pkl", path.name) or (
            path.name.startswith(".submission_file_") and not path.is_symlink()
        )
        if unsubmitted or any(path.resolve().name.startswith(f"{job}_") for job in jobs):
            path.unlink(missing_ok=True)
    for path in logs.glob(".submission_file_*"):
        if not path.exists():  # a link to a deleted file
            path.unlink()
    if logs.is_dir() and not any(logs.iterdir()):
        logs.rmdir()


def _remove(files: Iterable[Path], top: Path) -> None:
    """Delete files, and their folders below `top` that are then empty."""
    for path in files:
        path.unlink(missing_ok=True)
        for folder in path.parents[: len(path.relative_to(top).parents) - 1]:
            if any(folder.iterdir()):
                break
            folder.rmdir()


def submit_job(job: Job, logs: Path, dependency: str | None) -> list[str]:
    """Submit one job or array with sbatch and return the id of each task.

    Raises:
        UserError: sbatch fails.
    """
    python = python_words(job, logs)
    parameters = batch_parameters(job, logs, dependency, python)
    try:
        executor = submitit.SlurmExecutor(logs, python=python)
        executor.update_parameters(**parameters)
        with outside_job():
            submitted = executor.submit_array([make_program(task, logs) for task in job.tasks])
    except RuntimeError as error:  # the public base class of submitit's errors
        raise UserError(f"Slurm rejected {job.name}: {' '.join(str(error).split())}") from error
    return [each.job_id for each in submitted]


def run_locally(tasks: list[Task], registry: Registry, parallel: int) -> list[Task]:
    """Run `tasks` on this machine in the order of their dependencies, `parallel` at a time; return the failed ones.

    Raises:
        KeyboardInterrupt: on Ctrl-C or `cancel`, after the running tasks have saved.
    """
    task_ids = registry.jobs = registry.jobs or {}
    write_configs(tasks)
    waiting, running, failed = list(tasks), dict[int, tuple[Task, submitit.Job]](), list[Task]()
    bar = ProgressBar(len(tasks), "tasks", "tasks")
    # `cancel` sends SIGTERM, because background jobs of a shell ignore SIGINT.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            for slot, (task, job) in list(running.items()):
                if job.done():
                    del running[slot]
                    bar.update()
                    for subtask in (subtask for subtask in task.subtasks if not subtask.is_done):
                        failed.append(subtask)
                        lines = final_log_lines(select_logs(find_logs(registry).get(job.job_id, ()), subtask))
                        logger.error("\n    ".join([f"slurm: {subtask.name} failed", *lines]))
            failed_names = {task.name for task in failed}
            for task in [task for task in waiting if failed_names & set(task.depends_on) and not task.after_any]:
                waiting.remove(task)
                failed += task.subtasks
                failed_names |= {subtask.name for subtask in task.subtasks}
                bar.update()
                logger.error("slurm: %s skipped: a task that it depends on failed", task.name)
            unfinished_tasks = [*waiting, *(task for task, _ in running.values())]
            unfinished = {subtask.name for task in unfinished_tasks for subtask in task.subtasks}
            free = parallel - len(running)
            for task in [task for task in waiting if not unfinished & set(task.depends_on)][:free]:
                waiting.remove(task)
                slot = next(slot for slot in range(parallel) if slot not in running)
                for subtask in task.subtasks:
                    (subtask.folder / ATTEMPTS_FILE).unlink(missing_ok=True)
                job = _start_local_job(task, registry, slot)
                running[slot] = task, job
                task_ids |= dict.fromkeys((subtask.name for subtask in task.subtasks), job.job_id)
                registry.save()
            time.sleep(POLL_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, previous)
        for _, job in running.values():
            os.kill(int(job.job_id), signal.SIGTERM)  # forwarded to the ranks, which save and exit
        while not all(job.done() for _, job in running.values()):
            time.sleep(POLL_SECONDS)
        bar.close()
    return failed


def run_in_process(tasks: list[Task], registry: Registry) -> list[Task]:
    """Run `tasks` one after another in this process, for a debugger; the first error is raised."""
    write_configs(tasks)
    executor = submitit.DebugExecutor(registry.logs)
    for task in tasks:
        logger.info("slurm: %s", task.name)
        (task.folder / ATTEMPTS_FILE).unlink(missing_ok=True)
        executor.submit(make_program(task, registry.logs)).result()
    return []


def make_program(task: Task, logs: Path) -> Program | PackedPrograms:
    programs = {
        slug(subtask.name): Program(subtask.command, subtask.folder, subtask.output, subtask.resources.attempts)
        for subtask in task.subtasks
    }
    return PackedPrograms(programs, logs) if task.packed else next(iter(programs.values()))


def describe_jobs(jobs: list[Job], registry: Registry, with_scripts: bool) -> str:
    """Format every job with its resources, dependencies, commands and, if it goes to Slurm, its batch script.

    In dependencies, JOB1 stands for the id of the first new job, and so on.
    """
    lines = []
    task_ids, job_ids = dict(registry.jobs or {}), dict[str, str]()
    for number, job in enumerate(jobs, 1):
        array = f", array of {len(job.tasks)}, {min(len(job.tasks), job.resources.parallel)} at a time"
        lines.append(f"{job.name}: {job.resources}{array if len(job.tasks) > 1 else ''}")
        if job.corresponds_to:
            lines.append(f"  after the corresponding array task of {job.corresponds_to}")
        elif job.depends_on:
            more = f" and {len(job.depends_on) - 4} more" if len(job.depends_on) > 4 else ""
            condition = ", even if they fail" if job.tasks[0].after_any else ""
            lines.append(f"  after {', '.join(job.depends_on[:4])}{more}{condition}")
        for task in job.tasks:
            lines += [f"  {task.name}: {len(task.packed)} runs on one GPU"] if task.packed else []
            lines += [f"  {subtask.name}: python {shlex.join(subtask.readable_command)}" for subtask in task.subtasks]
        if with_scripts:
            script = batch_script(job, registry.logs, dependency_option(job, task_ids, job_ids))
            lines += ["  batch script:", *(f"    {line}".rstrip() for line in script.splitlines())]
        job_ids[job.name] = f"JOB{number}"
        for index, task in enumerate(job.tasks):
            task_id = f"JOB{number}_{index}" if len(job.tasks) > 1 else f"JOB{number}"
            task_ids |= dict.fromkeys((subtask.name for subtask in task.subtasks), task_id)
    return "\n".join(lines)


@contextmanager
def submission_lock(out: Path) -> Iterator[None]:
    """Allow one submission of a sweep at a time.

    Raises:
        UserError: another process is submitting the sweep.
    """
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot create this folder ({error.strerror}). Choose another `out`.") from error
    with (out / LOCK).open("a+") as file:
        if not _lock(file):
            raise UserError(f"{out}: being submitted by another process. Wait until it has finished.")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        except UserError:
            if created and [path.name for path in out.iterdir()] == [LOCK]:
                (out / LOCK).unlink()
                for folder in created:
                    folder.rmdir()
            raise


def cancel_local(out: Path, jobs: list[str]) -> None:
    """Stop a sweep on this machine: signal the process that submits it or, if that has exited, its jobs.

    Never both: a second SIGTERM would end a run before it has saved.
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


def describe_outdated_folders(sweep: Sweep) -> list[str]:
    """Return one line per run folder that was written under an earlier config of its run."""
    lines = []
    current = {(run.folder.parent, run.seed): run.folder.name for run in sweep.runs}
    for parent in dict.fromkeys(run.folder.parent for run in sweep.runs):
        for folder in sorted(parent.glob("seed_*-*")):
            seed = folder.name.removeprefix("seed_").partition("-")[0]
            name = current.get((parent, int(seed))) if seed.isdigit() else None
            if name and name != folder.name:
                state = "finished" if (folder / "result.json").is_file() else "unfinished"
                lines.append(f"{folder}: {state}, but with another config; ignored in favour of {name}")
    return lines


def _start_local_job(task: Task, registry: Registry, slot: int) -> Any:
    requested = task.resources
    executor = submitit.LocalExecutor(registry.logs)
    count = requested.gpu_count
    gpus = tuple(range(slot * count, (slot + 1) * count))
    executor.update_parameters(
        timeout_min=NO_TIME_LIMIT,
        tasks_per_node=requested.tasks_per_node,
        gpus_per_node=count,
        visible_gpus=gpus,
    )
    # A terminal sends Ctrl-C to all processes. submitit's controller must ignore it: the ranks receive it themselves,
    # and `run_locally` sends the controller SIGTERM.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with environment_variables(**requested.environment):
            return executor.submit(make_program(task, registry.logs))
    finally:
        signal.signal(signal.SIGINT, previous)
