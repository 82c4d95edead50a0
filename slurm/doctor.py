"""Check what of a cluster works with a cluster file: `mgcc slurm doctor`."""

import getpass
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.slurm import cluster
from mgcc_dist.slurm.node_check import Check, check_node
from mgcc_dist.slurm.resources import Resources, load_cluster_file, merge_resources, program_defaults

REQUIRED = ("sbatch", "srun", "squeue", "scancel", "scontrol")
OLDEST = (20, 11)
"""the first version whose srun has --overlap"""
UNUSABLE = re.compile(r"down|drain|drng|fail|futr|inval|maint|unk|\*")
"""in sinfo's short states of nodes"""
TYPED = re.compile(r"\bgpu(?::([a-zA-Z][\w.-]*))?(?::(\d+))?(?=,|\(|$)")
"""GPUs in a list of generic resources: type, count"""


def examine(cluster_file: str | None, preset: str, shared: Path, wait_minutes: float) -> Iterator[Check]:
    """Check the cluster file, the commands, what the site allows, and one short job; yield each line when it is known.

    Args:
        cluster_file: None: the site's defaults
        preset: of `segment`, whose resources are requested as far as the cluster file has no others
        shared: folder that the nodes have to see
        wait_minutes: for the start of the job
    """
    try:
        keys = load_cluster_file(cluster_file) if cluster_file else {}
        defaults = program_defaults("segment", preset)
        requested = merge_resources([("presets.yaml", defaults), (cluster_file or "", keys)])
        warnings = requested.container.check() if requested.container else []
    except UserError as error:
        yield Check("cluster file", "failed", str(error), "Correct the file.")
        return
    yield Check("cluster file", "ok", f"{cluster_file or 'none'}: {requested}")
    for warning in warnings:
        yield Check("container", "warning", warning)
    if missing := [name for name in REQUIRED if not shutil.which(name)]:
        yield Check("commands", "failed", f"not on the PATH: {', '.join(missing)}", "Run this on a Slurm login node.")
        return
    yield Check("commands", "ok", ", ".join(REQUIRED))
    try:
        version = check_version()
        yield version
        if version.state == "failed":
            return
        settings = cluster.settings()
    except UserError as error:
        advice = "Ask the site whether slurmctld runs, or try again later."
        if "configuration source" in str(error):
            advice = "This machine has no slurm.conf. Run this on a Slurm login node, or set SLURM_CONF."
        yield Check("Slurm", "failed", str(error), advice)
        return
    checks = list(check_site(requested, settings))
    yield from checks
    if any(check.state == "failed" for check in checks):
        yield Check("test job", "warning", "not submitted", "Correct what failed, then run again.")
        return
    yield from check_node(requested, shared, wait_minutes)


def check_version() -> Check:
    """Check Slurm's version and that its controller answers.

    Raises:
        UserError: a command fails.
    """
    text = cluster.run("scontrol", "--version").strip()
    match = re.search(r"(\d+)\.(\d+)", text)
    if match and (int(match[1]), int(match[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return Check("Slurm", "failed", f"{text} is older than {oldest}", "Use another cluster, or ask for an update.")
    answer = cluster.run("scontrol", "ping").splitlines()
    if not any(line.endswith("UP") for line in answer):
        return Check("Slurm", "failed", f"{text}: {'; '.join(answer)}", "The controller is down. Try again later.")
    return Check("Slurm", "ok", f"{text}, the controller answers")


def check_site(requested: Resources, settings: dict[str, str]) -> Iterator[Check]:
    """Check what the site has and allows: partition, account, qos, GPUs, resources, accounting, preemption."""
    try:
        names = cluster.check_partition(requested)
    except UserError as error:
        yield Check("partition", "failed", str(error), "Correct the cluster file, or pass another --preset.")
        return
    yield check_nodes(names)
    yield check_account(requested, settings)
    if requested.gpu_count:
        yield check_gpus(requested, names)
    try:
        cluster.check_accepted(requested)
        yield Check("resources", "ok", "sbatch --test-only accepts them")
    except UserError as error:
        yield Check("resources", "failed", str(error), "Correct the cluster file, or pass another --preset.")
    yield check_accounting()
    yield check_preemption(names, settings)


def check_nodes(names: list[str]) -> Check:
    """Check that the partitions are up and have nodes that can run jobs."""
    existing = cluster.partitions()
    closed = [f"{name} is {state}" for name in names if (state := existing[name].get("State", "UP")) != "UP"]
    if closed:
        return Check("partition", "failed", ", ".join(closed), f"Choose another one of {', '.join(existing)}.")
    lines = cluster.run("sinfo", "--noheader", f"--partition={','.join(names)}", "--format=%t|%D").splitlines()
    counts = [(state.strip(), int(count)) for state, _, count in (line.partition("|") for line in lines)]
    total = sum(count for _, count in counts)
    usable = sum(count for state, count in counts if not UNUSABLE.search(state))
    detail = f"{', '.join(names)}: {usable} of {total} nodes can run jobs"
    if not usable:
        return Check("partition", "failed", detail, "See the reasons with `sinfo -R`, or choose another partition.")
    return Check("partition", "ok", detail)


def check_account(requested: Resources, settings: dict[str, str]) -> Check:
    """Check that account and qos are among the user's. Only a site that enforces them rejects jobs with others."""
    name = "account, qos"
    wanted = [f"{key} {value}" for key in ("account", "qos") if (value := getattr(requested, key))]
    asked = ", ".join(wanted) or "none requested"
    columns = ("format=Account,QOS", f"user={getpass.getuser()}")
    try:
        text = cluster.run("sacctmgr", "--noheader", "--parsable2", "show", "associations", *columns)
    except UserError as error:
        return Check(name, "warning", f"{asked}; not checked ({error})", "Slurm tells at submission.")
    rows = [line.split("|") for line in text.splitlines() if "|" in line]
    accounts = sorted({row[0] for row in rows if row[0]})
    enforced = settings.get("AccountingStorageEnforce", "none").lower()
    state: str = "failed" if "associations" in enforced else "warning"
    if requested.account and requested.account not in accounts:
        problem = f"account {requested.account} is not one of yours ({', '.join(accounts) or 'you have none'})"
    elif requested.qos and not any(_has_qos(row, requested) for row in rows):
        qos = sorted({each for row in rows for each in row[1].split(",") if each})
        problem = f"qos {requested.qos} is not one of yours ({', '.join(qos) or 'you have none'})"
    elif "associations" in enforced and not accounts:
        problem = "you have no account, and this site requires one"
    else:
        return Check(name, "ok", f"{asked}; yours: {', '.join(accounts) or 'none'}")
    advice = "Correct the cluster file, or ask the site for access."
    return Check(name, "failed" if state == "failed" else "warning", problem, advice)


def _has_qos(row: list[str], requested: Resources) -> bool:
    account, qos = row[:2]
    return requested.qos in qos.split(",") and requested.account in (None, account)


def check_gpus(requested: Resources, names: list[str]) -> Check:
    """Check that nodes of the partitions have as many GPUs of the requested type."""
    text = cluster.run("sinfo", "--noheader", f"--partition={','.join(names)}", "--format=%G")
    available: dict[str, int] = {}
    for kind, count in TYPED.findall(text.replace("\n", ",")):
        available[kind] = max(available.get(kind, 0), int(count or 1))
    shown = ", ".join(f"{count} x {kind or 'GPU'}" for kind, count in sorted(available.items())) or "none"
    there = f"nodes of {', '.join(names)} have: {shown}"
    if not available:
        return Check("GPUs", "failed", there, "Choose a partition with GPUs, or set `gpus: 0`.")
    wanted = TYPED.findall(requested.gres or f"gpu:{requested.gpus}")
    for kind, count in wanted:
        most = max(available.values()) if not kind else available.get(kind, 0)
        if int(count or 1) > most:
            asked = f"{count or 1} x {kind or 'GPU'} per node requested"
            return Check("GPUs", "failed", f"{asked}; {there}", "Correct `gpus` or `gres`.")
    return Check("GPUs", "ok", f"{requested.gres or requested.gpus} per node requested; {there}")


def check_accounting() -> Check:
    """Check that sacct answers."""
    try:
        cluster.run("sacct", "--noheader", "--allocations", "--format=JobID", "--starttime=now-1hour")
    except UserError as error:
        advice = "Nothing to do: `mgcc slurm status` then shows failed tasks without Slurm's reason."
        return Check("accounting", "warning", str(error), advice)
    return Check("accounting", "ok", "sacct answers")


def check_preemption(names: list[str], settings: dict[str, str]) -> Check:
    """Check that a job which Slurm preempts is requeued."""
    existing = cluster.partitions()
    site = settings.get("PreemptMode", "OFF")
    modes = {name: existing[name].get("PreemptMode", site) for name in names}
    if settings.get("PreemptType", "preempt/none") in ("preempt/none", "(null)"):
        return Check("preemption", "ok", "this site preempts no jobs")
    cancelling = [name for name, mode in modes.items() if "CANCEL" in mode]
    if cancelling:
        what = f"jobs of {', '.join(cancelling)} are cancelled, not requeued (PreemptMode=CANCEL)"
        times = ", ".join(f"{existing[name].get('GraceTime', 0)} s for {name}" for name in cancelling)
        advice = (
            f"A run that saves within the grace time ({times}) requeues itself. "
            "Restart others with `mgcc slurm resume`."
        )
        return Check("preemption", "warning", what, advice)
    return Check("preemption", "ok", ", ".join(f"{name}: PreemptMode={mode}" for name, mode in modes.items()))


def format_check(check: Check) -> str:
    """Format a line of the table, and one with the advice."""
    advice = f"\n{'':24}-> {check.advice}" if check.advice else ""
    return f"{check.state:9}{check.name:15}{check.detail}{advice}"
