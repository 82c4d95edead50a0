"""Run a sweep on a Slurm cluster: submit it, show its status, resume failed runs.

    mgcc slurm doctor --cluster-file mine.yaml
    mgcc slurm submit table_1 --dry-run
    mgcc slurm submit table_1 --cluster-file one_gpu_partition
    mgcc slurm submit my_sweep.yaml --datasets BUSI --seeds 1
    mgcc slurm status table_1 --watch
    mgcc slurm resume table_1
    mgcc slurm logs   table_1 busi/mgcc/seed_1
    mgcc slurm cancel table_1
    mgcc slurm report table_1

Finished, running and pending runs are not submitted again. docs/how-to/cluster.md has the details.
"""

import logging
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.options import argument, flag
from mgcc_dist.common.program import Command, Program
from mgcc_dist.common.value_types import FileOrName, FolderPath, Name, PositiveFloat, PositiveInt
from mgcc_dist.slurm import cluster, job_graph, resources, status
from mgcc_dist.slurm.job_graph import REPORT, Task
from mgcc_dist.slurm.status import Registry
from mgcc_dist.sweep.expansion import Sweep, read_sweep
from mgcc_dist.sweep.selection import SelectionOptions, SweepOptions

logger = logging.getLogger("mgcc_dist.slurm")

EXIT_FAILED = 1
"""exit code if a task of the sweep, or a check of `doctor`, has failed"""
EXIT_STOPPED = 130
"""exit code after Ctrl-C or `cancel` of a sweep on this machine"""


@dataclass(frozen=True)
class SubmitConfig(SelectionOptions):
    cluster: Literal["slurm", "local", "debug"] | None = None
    """slurm; local: on this machine; debug: in one process; none: as in the last submission, or slurm"""
    cluster_file: FileOrName | None = None
    """YAML file of resources, or the name of a file in slurm/clusters; none: as in the last submission"""
    parallel: PositiveInt = 1
    """number of tasks at the same time with --cluster local"""
    dry_run: bool = flag()
    """print the jobs and their batch scripts, and check their resources, without submitting them"""


@dataclass(frozen=True)
class StatusConfig(SelectionOptions):
    watch: bool = flag()
    """refresh until all tasks have ended"""
    every: PositiveFloat = 10.0
    """seconds between refreshes with --watch"""


@dataclass(frozen=True)
class LogsConfig(SweepOptions):
    run: Name = argument(positional=True)
    """the beginning of the task's name in `status`"""


@dataclass(frozen=True)
class DoctorConfig:
    cluster_file: FileOrName | None = None
    """YAML file of resources, or the name of a file in slurm/clusters; none: the site's defaults"""
    preset: FileOrName = "mgcc_busi"
    """preset of `mgcc segment` whose resources are requested as far as the cluster file has no others"""
    folder: FolderPath = Path()
    """folder that this machine and the nodes share, such as the `out` of a sweep"""
    wait: PositiveFloat = 5.0
    """minutes after which a test job that has not started is cancelled"""


def start(config: SubmitConfig, retry_failed: bool) -> None:
    """Submit missing tasks and, with `retry_failed`, failed ones."""
    from mgcc_dist.slurm import submit  # needs submitit

    sweep = config.read()
    if config.dry_run:
        if sweep.out.is_file() or (sweep.out / submit.LOCK).is_file():
            with submit.submission_lock(sweep.out):  # raises what submitting would
                pass
        _start(config, retry_failed, sweep)
    else:
        with submit.submission_lock(sweep.out):
            _start(config, retry_failed, sweep)


def _start(config: SubmitConfig, retry_failed: bool, sweep: Sweep) -> None:
    from mgcc_dist.slurm import submit  # needs submitit

    registry = Registry.read(sweep.out)
    registry.cluster = config.cluster or registry.cluster
    registry.cluster_file = config.cluster_file or registry.cluster_file
    max_array_size = cluster.DEFAULT_MAX_ARRAY_SIZE
    unreachable = None
    if config.dry_run and registry.cluster == "slurm":
        try:
            max_array_size = cluster.max_array_size()
        except UserError as error:
            unreachable, registry.jobs = str(error), {}  # the states of submitted jobs are unknown
    tasks = _tasks(sweep, registry)
    for line in submit.describe_outdated_folders(sweep):
        logger.warning("slurm: %s", line)
    statuses = status.query(tasks, registry)
    selected = submit.select_tasks(statuses, retry_failed)
    failed = sum(each.state == "failed" for each in statuses)
    if failed and not retry_failed:
        logger.warning(
            "slurm: %d failed earlier. Run `mgcc slurm resume %s` to start them again.", failed, config.sweep
        )
    if not selected:
        print(f"slurm: nothing to submit; {status.summarize(statuses)}")
        return
    count = len(selected)
    if registry.cluster != "debug":
        selected = job_graph.pack_runs(selected)
    if registry.cluster == "slurm":
        submit.check_containers(selected)
    if registry.cluster == "slurm" and not unreachable:
        selected = submit.within_limit(selected)
        fitting = sum(len(task.subtasks) for task in selected)
        if fitting < count:
            logger.warning(
                "slurm: max_submitted leaves room for %d of %d tasks. Run the same command again when some have ended.",
                *(fitting, count),
            )
            count = fitting
        if not selected:
            return
    if config.dry_run:
        waiting = [each.task.name for each in statuses if each.state in ("pending", "running")]
        jobs = job_graph.build_jobs(selected, waiting, max_array_size, sweep.name)
        if unreachable:
            logger.warning(
                "slurm: resources and earlier jobs were not checked, because Slurm cannot be used here: %s", unreachable
            )
        elif registry.cluster == "slurm":
            submit.check_jobs(jobs)
        print(submit.describe_jobs(jobs, registry, with_scripts=registry.cluster == "slurm"))
        print(f"slurm: dry run; {count} tasks in {len(jobs)} jobs were not submitted")
    elif registry.cluster == "slurm":
        jobs = submit.submit_to_slurm(sweep, selected, statuses, registry)
        print(f"slurm: {count} tasks submitted in {len(jobs)} jobs; logs are in {registry.logs}")
        print(f"slurm: run `mgcc slurm status {config.sweep}` to follow them")
    else:
        try:
            if registry.cluster == "local":
                failures = submit.run_locally(selected, registry, config.parallel)
            else:
                failures = submit.run_in_process(selected, registry)
        except KeyboardInterrupt:
            logger.warning("slurm: stopped. Run `mgcc slurm resume %s` to resume from the checkpoints.", config.sweep)
            sys.exit(EXIT_STOPPED)
        print(f"slurm: {count - len(failures)} of {count} tasks are done; logs are in {registry.logs}")
        if failures:
            sys.exit(EXIT_FAILED)


def show_status(config: StatusConfig) -> None:
    """Print the status table; exit with code 1 if a task has failed."""
    from mgcc_dist.slurm import submit  # needs submitit

    sweep = config.read()
    registry = Registry.read(sweep.out)
    tasks = _tasks(sweep, registry)
    if config.watch:
        statuses = status.watch(tasks, registry, config.every)
    else:
        statuses = status.query(tasks, registry)
        print(status.format_table(statuses, registry))
    for line in submit.describe_outdated_folders(sweep):
        print(line)
    if any(each.state == "failed" for each in statuses):
        sys.exit(EXIT_FAILED)


def cancel(config: SelectionOptions) -> None:
    """Cancel all pending and running tasks."""
    from mgcc_dist.slurm import submit  # needs submitit

    sweep = config.read()
    registry = Registry.read(sweep.out)
    statuses = status.query(_tasks(sweep, registry), registry)
    jobs = list(dict.fromkeys(each.job for each in statuses if each.state in ("pending", "running")))
    if not jobs:
        print("slurm: nothing is pending or running")
        return
    if registry.cluster == "slurm":
        cluster.cancel(jobs)
    else:
        submit.cancel_local(sweep.out, jobs)
    print(f"slurm: {len(jobs)} tasks cancelled. Run `mgcc slurm resume {config.sweep}` to resume from the checkpoints.")


def show_logs(config: LogsConfig) -> None:
    """Print the logs of a task's latest job."""
    sweep = read_sweep(config.sweep)
    registry = Registry.read(sweep.out)
    tasks = [task for task in _tasks(sweep, registry) if task.name.startswith(config.run)]
    if len(tasks) != 1:
        names = ", ".join(task.name for task in tasks) or "none"
        raise UserError(f"{config.run!r} must be the beginning of exactly one task name. Matching tasks: {names}.")
    job = (registry.jobs or {}).get(tasks[0].name, "")
    logs = status.select_logs(status.find_logs(registry).get(job, ()), tasks[0])
    if not logs:
        raise UserError(f"{tasks[0].name}: no log in {registry.logs} yet")
    for path in logs:
        print(f"==> {path} <==\n{path.read_text(errors='replace')}")


def make_report(config: SelectionOptions) -> None:
    """Build the report of the selected runs that have finished so far."""
    sweep = config.read()
    if not sweep.runs:
        raise UserError(f"{config.sweep}: has no runs to report. Its best trial is in {sweep.out / 'search'}.")
    (report,) = (task for task in _tasks(sweep, Registry.read(sweep.out)) if task.name == REPORT)
    selected = {"--datasets": config.datasets, "--rows": config.rows, "--seeds": map(str, config.seeds)}
    words = [word for option, values in selected.items() if (each := list(values)) for word in (option, *each)]
    sys.exit(subprocess.run([sys.executable, *report.command, *words], check=False).returncode)


def diagnose(config: DoctorConfig) -> None:
    """Print what works of a cluster; exit with code 1 if a check fails."""
    from mgcc_dist.slurm import doctor  # needs submitit

    states = Counter[str]()
    for check in doctor.examine(config.cluster_file, config.preset, config.folder, config.wait):
        print(doctor.format_check(check), flush=True)
        states[check.state] += 1
    print(f"doctor: {', '.join(f'{count} {state}' for state, count in states.items())}")
    if states["failed"]:
        sys.exit(EXIT_FAILED)


def _tasks(sweep: Sweep, registry: Registry) -> list[Task]:
    name = registry.cluster_file
    return job_graph.build_tasks(sweep, resources.load_cluster_file(name) if name else {}, name or "")


PROGRAM = Program(
    "slurm",
    __doc__,
    commands={
        "doctor": Command(DoctorConfig, diagnose, "check a cluster file, the site and a node by one short job"),
        "submit": Command(
            SubmitConfig,
            partial(start, retry_failed=False),
            "submit all tasks that are neither finished nor submitted",
        ),
        "resume": Command(SubmitConfig, partial(start, retry_failed=True), "submit failed and missing tasks"),
        "status": Command(StatusConfig, show_status, "show the state of every task; exit code 1 if one has failed"),
        "cancel": Command(SelectionOptions, cancel, "cancel all pending and running tasks"),
        "logs": Command(LogsConfig, show_logs, "print the logs of a task's latest job"),
        "report": Command(SelectionOptions, make_report, "build OUT/report.html from the finished runs"),
    },
)
main = PROGRAM.main

if __name__ == "__main__":
    run_program("slurm", main)
