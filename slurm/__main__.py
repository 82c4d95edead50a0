"""Carry a whole sweep out on a cluster: submit it, look at it, take failed runs up again.

python -m mgcc_dist.slurm submit configs/sweeps/table_1.yaml --dry-run
python -m mgcc_dist.slurm submit configs/sweeps/table_1.yaml --cluster-file one_gpu_partition
python -m mgcc_dist.slurm status configs/sweeps/table_1.yaml --watch
python -m mgcc_dist.slurm resume configs/sweeps/table_1.yaml
python -m mgcc_dist.slurm logs   configs/sweeps/table_1.yaml busi/mgcc/seed_1
python -m mgcc_dist.slurm cancel configs/sweeps/table_1.yaml
python -m mgcc_dist.slurm report configs/sweeps/table_1.yaml

What is finished, running or waiting is not submitted again. docs/how-to/cluster.md has the rest.
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
from mgcc_dist.slurm import cluster, plan, resources, status, submit
from mgcc_dist.slurm.plan import REPORT, Task, jobs_of, tasks_of
from mgcc_dist.slurm.status import Registry

EXIT_FAILED = 1
"""Exit code when a task of the sweep has failed."""
EXIT_STOPPED = 130
"""Exit code after Ctrl-C, or `cancel`, of a sweep on this machine."""


def main(argv: Sequence[str] | None = None) -> None:
    run = {
        "submit": lambda given: start(given, again=False),
        "resume": lambda given: start(given, again=True),
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


def start(given: Namespace, again: bool) -> None:
    """Submit what is missing and, with `again`, what has failed."""
    sweep = read_sweep(given.sweep)
    if given.dry_run:
        _start(given, again, sweep)
    else:
        with submit.locked(sweep.out):
            _start(given, again, sweep)


def _start(given: Namespace, again: bool, sweep: Sweep) -> None:
    registry = Registry.read(sweep.out)
    registry.cluster = given.cluster or registry.cluster
    registry.cluster_file = given.cluster_file or registry.cluster_file
    tasks = _tasks(sweep, given.sweep, registry)
    for line in submit.outdated(sweep):
        print(f"slurm: {line}")
    states = status.states_of(tasks, registry)
    chosen = submit.wanted(states, again)
    failed = sum(state.kind == "failed" for state in states)
    if failed and not again:
        print(f"slurm: {failed} failed earlier; `python -m mgcc_dist.slurm resume {given.sweep}` starts them again")
    if not chosen:
        print(f"slurm: nothing to submit; {status.summary(states)}")
        return
    number = len(chosen)
    if registry.cluster != "debug":
        chosen = plan.shared(chosen)
    if given.dry_run:
        on_slurm = registry.cluster == "slurm"
        waiting = [state.task.name for state in states if state.kind in ("pending", "running")]
        jobs = jobs_of(chosen, waiting, cluster.largest_array() if on_slurm else len(tasks), sweep.name)
        print(submit.describe(jobs))
        print(f"slurm: a dry run; {number} tasks in {len(jobs)} jobs were not submitted")
    elif registry.cluster == "slurm":
        jobs = submit.to_slurm(sweep, chosen, states, registry)
        print(f"slurm: {number} tasks submitted in {len(jobs)} jobs; logs are in {registry.logs}")
        print(f"slurm: `python -m mgcc_dist.slurm status {given.sweep}` shows how they are")
    else:
        here = registry.cluster == "local"
        try:
            failures = submit.locally(chosen, registry, given.parallel) if here else submit.in_process(chosen, registry)
        except KeyboardInterrupt:
            print(f"slurm: stopped; `python -m mgcc_dist.slurm resume {given.sweep}` goes on from the checkpoints")
            sys.exit(EXIT_STOPPED)
        print(f"slurm: {number - len(failures)} of {number} tasks are done; logs are in {registry.logs}")
        if failures:
            sys.exit(EXIT_FAILED)


def show_status(given: Namespace) -> None:
    """The table; exit code 1 when something has failed."""
    sweep = read_sweep(given.sweep)
    registry = Registry.read(sweep.out)
    tasks = _tasks(sweep, given.sweep, registry)
    if given.watch:
        states = status.watch(tasks, registry, given.every)
    else:
        states = status.states_of(tasks, registry)
        print(status.table(states, registry))
    for line in submit.outdated(sweep):
        print(line)
    if any(state.kind == "failed" for state in states):
        sys.exit(EXIT_FAILED)


def cancel(given: Namespace) -> None:
    """End what is pending or running."""
    sweep = read_sweep(given.sweep)
    registry = Registry.read(sweep.out)
    states = status.states_of(_tasks(sweep, given.sweep, registry), registry)
    jobs = list(dict.fromkeys(state.job for state in states if state.kind in ("pending", "running")))
    if not jobs:
        print("slurm: nothing is pending or running")
        return
    if registry.cluster == "slurm":
        cluster.cancel(jobs)
    else:
        submit.stop_local(sweep.out, jobs)
    print(f"slurm: {len(jobs)} tasks cancelled; `resume` goes on from their checkpoints")


def show_logs(given: Namespace) -> None:
    """What the latest job of a run wrote."""
    sweep = read_sweep(given.sweep)
    registry = Registry.read(sweep.out)
    tasks = [task for task in _tasks(sweep, given.sweep, registry) if task.name.startswith(given.run)]
    if len(tasks) != 1:
        names = ", ".join(task.name for task in tasks) or "none"
        raise UserError(f"{given.run!r} must be the beginning of one task's name; it is of {names}")
    logs = status.own(status.logs_of(registry).get((registry.jobs or {}).get(tasks[0].name, ""), ()), tasks[0])
    if not logs:
        raise UserError(f"{tasks[0].name} has no log yet in {registry.logs}")
    for path in logs:
        print(f"==> {path} <==\n{path.read_text(errors='replace')}")


def make_report(given: Namespace) -> None:
    """The report of what is finished by now."""
    sweep = read_sweep(given.sweep)
    report = next(task for task in _tasks(sweep, given.sweep, Registry.read(sweep.out)) if task.name == REPORT)
    sys.exit(subprocess.run([sys.executable, *report.command], check=False).returncode)


def _tasks(sweep: Sweep, path: Path, registry: Registry) -> list[Task]:
    name = registry.cluster_file
    return tasks_of(sweep, path, resources.cluster_file(name) if name else {}, name or "")


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
        ("submit", "submit what is neither finished nor submitted"),
        ("resume", "submit what has failed or is missing"),
    ):
        command = add(name, text)
        command.add_argument(
            "--cluster",
            type=Literal["slurm", "local", "debug"] | None,
            default=None,
            help="slurm; or on this machine local, or debug in one process (default: as before, or slurm)",
        )
        command.add_argument(
            "--cluster-file",
            type=str | None,
            default=None,
            help="YAML file of resources, or the name of one in slurm/clusters (default: as before)",
        )
        command.add_argument("--parallel", type=PositiveInt, default=1, help="tasks at a time with --cluster local")
        command.add_argument("--dry-run", action="store_true", help="print the jobs, submit nothing")
    command = add("status", "how every task stands; exit code 1 when one has failed")
    command.add_argument("--watch", action="store_true", help="again and again until all are over")
    command.add_argument("--every", type=PositiveFloat, default=10, help="seconds between looks of --watch")
    add("cancel", "end what is pending or running")
    command = add("logs", "what a run's latest job wrote")
    command.add_argument("run", type=str, help="the beginning of its name in `status`")
    add("report", "make OUT/report.html of what is finished")
    return parser


if __name__ == "__main__":
    run_program("slurm", main)
