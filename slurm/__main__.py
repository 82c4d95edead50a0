"""Run a sweep on a Slurm cluster: submit it, show its status, resume failed runs.

    mgcc slurm submit configs/sweeps/table_1.yaml --dry-run
    mgcc slurm submit configs/sweeps/table_1.yaml --cluster-file one_gpu_partition
    mgcc slurm status configs/sweeps/table_1.yaml --watch
    mgcc slurm resume configs/sweeps/table_1.yaml
    mgcc slurm logs   configs/sweeps/table_1.yaml busi/mgcc/seed_1
    mgcc slurm cancel configs/sweeps/table_1.yaml
    mgcc slurm report configs/sweeps/table_1.yaml

Finished, running and pending runs are not submitted again. docs/how-to/cluster.md has the details.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

from mgcc_dist.common.config import HelpFormatter
from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.sweep_file import Sweep, read_sweep
from mgcc_dist.slurm import cluster, job_graph, resources, status, submit
from mgcc_dist.slurm.job_graph import REPORT, Task
from mgcc_dist.slurm.status import Registry

EXIT_FAILED = 1
"""exit code if a task of the sweep has failed"""
EXIT_STOPPED = 130
"""exit code after Ctrl-C or `cancel` of a sweep on this machine"""


def main(argv: Sequence[str] | None = None) -> None:
    run = {
        "submit": lambda given: start(given, retry_failed=False),
        "resume": lambda given: start(given, retry_failed=True),
        "status": show_status,
        "cancel": cancel,
        "logs": show_logs,
        "report": make_report,
    }
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        given = _parser().parse_args(words)
    except ArgumentError as error:
        raise UserError(" ".join(error.message.split())) from error
    run[given.command](given[given.command])


def start(given: Namespace, retry_failed: bool) -> None:
    """Submit missing tasks and, with `retry_failed`, failed ones."""
    sweep = read_sweep(given.sweep)
    if given.dry_run:
        _start(given, retry_failed, sweep)
    else:
        with submit.submission_lock(sweep.out):
            _start(given, retry_failed, sweep)


def _start(given: Namespace, retry_failed: bool, sweep: Sweep) -> None:
    registry = Registry.read(sweep.out)
    registry.cluster = given.cluster or registry.cluster
    registry.cluster_file = given.cluster_file or registry.cluster_file
    tasks = _tasks(sweep, given.sweep, registry)
    for line in submit.describe_outdated_folders(sweep):
        print(f"slurm: {line}")
    statuses = status.query(tasks, registry)
    selected = submit.select_tasks(statuses, retry_failed)
    failed = sum(each.state == "failed" for each in statuses)
    if failed and not retry_failed:
        print(f"slurm: {failed} failed earlier. Run `mgcc slurm resume {given.sweep}` to start them again.")
    if not selected:
        print(f"slurm: nothing to submit; {status.summarize(statuses)}")
        return
    count = len(selected)
    if registry.cluster != "debug":
        selected = job_graph.pack_runs(selected)
    if given.dry_run:
        waiting = [each.task.name for each in statuses if each.state in ("pending", "running")]
        max_array_size = cluster.max_array_size() if registry.cluster == "slurm" else len(tasks)
        jobs = job_graph.build_jobs(selected, waiting, max_array_size, sweep.name)
        print(submit.describe_jobs(jobs))
        print(f"slurm: dry run; {count} tasks in {len(jobs)} jobs were not submitted")
    elif registry.cluster == "slurm":
        jobs = submit.submit_to_slurm(sweep, selected, statuses, registry)
        print(f"slurm: {count} tasks submitted in {len(jobs)} jobs; logs are in {registry.logs}")
        print(f"slurm: run `mgcc slurm status {given.sweep}` to follow them")
    else:
        try:
            if registry.cluster == "local":
                failures = submit.run_locally(selected, registry, given.parallel)
            else:
                failures = submit.run_in_process(selected, registry)
        except KeyboardInterrupt:
            print(f"slurm: stopped. Run `mgcc slurm resume {given.sweep}` to resume from the checkpoints.")
            sys.exit(EXIT_STOPPED)
        print(f"slurm: {count - len(failures)} of {count} tasks are done; logs are in {registry.logs}")
        if failures:
            sys.exit(EXIT_FAILED)


def show_status(given: Namespace) -> None:
    """Print the status table; exit with code 1 if a task has failed."""
    sweep = read_sweep(given.sweep)
    registry = Registry.read(sweep.out)
    tasks = _tasks(sweep, given.sweep, registry)
    if given.watch:
        statuses = status.watch(tasks, registry, given.every)
    else:
        statuses = status.query(tasks, registry)
        print(status.format_table(statuses, registry))
    for line in submit.describe_outdated_folders(sweep):
        print(line)
    if any(each.state == "failed" for each in statuses):
        sys.exit(EXIT_FAILED)


def cancel(given: Namespace) -> None:
    """Cancel all pending and running tasks."""
    sweep = read_sweep(given.sweep)
    registry = Registry.read(sweep.out)
    statuses = status.query(_tasks(sweep, given.sweep, registry), registry)
    jobs = list(dict.fromkeys(each.job for each in statuses if each.state in ("pending", "running")))
    if not jobs:
        print("slurm: nothing is pending or running")
        return
    if registry.cluster == "slurm":
        cluster.cancel(jobs)
    else:
        submit.cancel_local(sweep.out, jobs)
    print(f"slurm: {len(jobs)} tasks cancelled. Run `mgcc slurm resume {given.sweep}` to resume from the checkpoints.")


def show_logs(given: Namespace) -> None:
    """Print the logs of a task's latest job."""
    sweep = read_sweep(given.sweep)
    registry = Registry.read(sweep.out)
    tasks = [task for task in _tasks(sweep, given.sweep, registry) if task.name.startswith(given.run)]
    if len(tasks) != 1:
        names = ", ".join(task.name for task in tasks) or "none"
        raise UserError(f"{given.run!r} must be the beginning of exactly one task name. Matching tasks: {names}.")
    job = (registry.jobs or {}).get(tasks[0].name, "")
    logs = status.select_logs(status.find_logs(registry).get(job, ()), tasks[0])
    if not logs:
        raise UserError(f"{tasks[0].name}: no log in {registry.logs} yet")
    for path in logs:
        print(f"==> {path} <==\n{path.read_text(errors='replace')}")


def make_report(given: Namespace) -> None:
    """Build the report of the runs that have finished so far."""
    sweep = read_sweep(given.sweep)
    report = next(task for task in _tasks(sweep, given.sweep, Registry.read(sweep.out)) if task.name == REPORT)
    sys.exit(subprocess.run([sys.executable, *report.command], check=False).returncode)


def _tasks(sweep: Sweep, path: Path, registry: Registry) -> list[Task]:
    name = registry.cluster_file
    return job_graph.build_tasks(sweep, path, resources.load_cluster_file(name) if name else {}, name or "")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="slurm", description=__doc__, formatter_class=HelpFormatter, exit_on_error=False, allow_abbrev=False
    )
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")

    def add(name: str, text: str) -> ArgumentParser:
        command = ArgumentParser(
            description=text, formatter_class=HelpFormatter, exit_on_error=False, allow_abbrev=False
        )
        command.add_argument("sweep", type=Path, help="sweep file")
        commands.add_subcommand(name, command, help=text)
        return command

    for name, text in (
        ("submit", "submit all tasks that are neither finished nor submitted"),
        ("resume", "submit failed and missing tasks"),
    ):
        command = add(name, text)
        command.add_argument(
            "--cluster",
            type=Literal["slurm", "local", "debug"] | None,
            default=None,
            help="slurm; local: on this machine; debug: in one process (default: as in the last submission, or slurm)",
        )
        command.add_argument(
            "--cluster-file",
            type=str | None,
            default=None,
            help="YAML file of resources, or the name of a file in slurm/clusters (default: as in the last submission)",
        )
        command.add_argument(
            "--parallel", type=PositiveInt, default=1, help="number of tasks at the same time with --cluster local"
        )
        command.add_argument("--dry-run", action="store_true", help="print the jobs without submitting them")
    command = add("status", "show the state of every task; exit code 1 if one has failed")
    command.add_argument("--watch", action="store_true", help="refresh until all tasks have ended")
    command.add_argument("--every", type=PositiveFloat, default=10, help="seconds between refreshes with --watch")
    add("cancel", "cancel all pending and running tasks")
    command = add("logs", "print the logs of a task's latest job")
    command.add_argument("run", type=str, help="the beginning of the task's name in `status`")
    add("report", "build OUT/report.html from the finished runs")
    return parser


if __name__ == "__main__":
    run_program("slurm", main)
