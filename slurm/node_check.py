"""The doctor's job: one short task on a node, submitted like those of a sweep, and what its report says."""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal
from uuid import uuid4

from submitit.slurm.slurm import _make_sbatch_string

from mgcc_dist.common.errors import UserError
from mgcc_dist.slurm import cluster, probe
from mgcc_dist.slurm.batch import outside_job
from mgcc_dist.slurm.resources import Resources

NAME = "mgcc-doctor"
TIME_LIMIT, SIGNAL_SECONDS = "2", 80
"""minutes, and seconds before. Slurm sends signals up to a minute early, so this one comes 0 to 40 s after the start"""
PROBE_SECONDS = 100
"""after which the probe no longer waits for the signal"""
POLL_SECONDS = 1.0
FILE_SECONDS = 20.0
"""a network file system may show another machine's files only after a while"""
PACKAGES = ("mgcc-dist", "torch", "accelerate", "diffusers", "webdataset", "submitit", "cloudpickle", "numpy")


@dataclass(frozen=True)
class Check:
    """A line of the doctor's table."""

    name: str
    state: Literal["ok", "warning", "failed"]
    detail: str
    """what was found"""
    advice: str = ""
    """what to do"""


def job_resources(requested: Resources) -> Resources:
    """Return the resources of the doctor's job: one task, at most one GPU, two minutes."""
    kind, colon, _ = str(requested.gpus).rpartition(":")
    extra = {key: value for key, value in requested.extra.items() if key != "exclusive"}
    return replace(
        requested,
        nodes=requested.nodes if requested.nodelist else 1,
        tasks_per_node=1,
        gpus=f"{kind}{colon}1" if requested.gpu_count else 0,
        cpus=min(requested.cpus, 2),
        memory_gb=requested.memory_gb and min(requested.memory_gb, 4),
        time=TIME_LIMIT,
        signal_seconds=SIGNAL_SECONDS,
        extra=extra,
    )


def script(requested: Resources, folder: Path, token: str) -> str:
    """Return the batch script; it reports to FOLDER/job.log as lines of `doctor: KEY VALUE`."""
    python = shlex.quote(sys.executable)
    after_setup = ["echo doctor: setup"]
    if requested.scratch:
        after_setup.append('touch "$TMPDIR/doctor" && echo "doctor: scratch $TMPDIR"')
    if container := requested.container:
        python = container.python({folder, Path.cwd()}, requested.scratch, gpus=requested.gpu_count > 0)
        if container.runtime != "pyxis":
            after_setup.append(f'found=$({container.runtime} --version) && echo "doctor: runtime $found"')
        if container.image_file:
            after_setup.append(f"[ -e {shlex.quote(str(container.image_file))} ] && echo doctor: image")
    parameters = requested.executor_parameters()
    parameters["setup"] = [
        'echo "doctor: node $SLURMD_NODENAME"',
        f'[ "$(cat {shlex.quote(str(folder / "token"))})" = {token} ] && echo doctor: token',
        'scontrol show job -o "$SLURM_JOB_ID" >/dev/null && echo doctor: scontrol',
        *parameters["setup"],
        *after_setup,
    ]
    parameters["teardown"] = ['echo "doctor: srun $?"', *requested.teardown_lines()]
    log = str(folder / "job.log").replace("%", "%%")
    parameters["additional_parameters"] |= {"output": log, "error": log}
    del parameters["additional_parameters"]["requeue"]
    parameters["srun_args"] += ["--nodes=1", "--ntasks=1", "--output", log, "--error", log, "--open-mode=append"]
    words = [str(folder / "probe.py"), str(folder), str(PROBE_SECONDS), *PACKAGES]
    return _make_sbatch_string(f"{python} -u {shlex.join(words)}", folder, job_name=NAME, **parameters)


def check_node(requested: Resources, shared: Path, wait_minutes: float) -> Iterator[Check]:
    """Run the doctor's job and report what works in it; the job is cancelled if it does not start in time."""
    try:
        folder = Path(mkdtemp(prefix=".mgcc-doctor-", dir=shared)).absolute()
    except OSError as error:
        yield Check("shared folder", "failed", f"{shared}: {error.strerror}", "Choose another with --folder.")
        return
    token, job = uuid4().hex, ""
    try:
        (folder / "token").write_text(token)
        shutil.copy(probe.__file__, folder / "probe.py")
        small = job_resources(requested)
        (folder / "job.sh").write_text(script(small, folder, token))
        with outside_job():
            job = cluster.run("sbatch", "--parsable", str(folder / "job.sh")).strip().partition(";")[0]
        pending = _wait(job, wait_minutes)
        if pending:
            yield Check(
                "test job",
                "warning",
                f"job {job} did not start within {wait_minutes:g} min ({pending}); cancelled",
                "Run again with a longer --wait, or see `squeue --start`.",
            )
            return
        log, report = _read(folder)
        job = ""
        yield from read_report(small, shared, log, report)
    except UserError as error:
        yield Check("test job", "failed", str(error), "Correct the cluster file.")
    finally:
        if job:
            cluster.cancel([job])
        shutil.rmtree(folder, ignore_errors=True)


def _wait(job: str, minutes: float) -> str:
    """Wait until the job has ended; return Slurm's reason if it has not started within `minutes`, else ""."""
    deadline = time.monotonic() + minutes * 60
    while entry := cluster.queue().get(job):
        if entry.state == "PENDING" and time.monotonic() > deadline:
            return entry.reason
        time.sleep(POLL_SECONDS)
    return ""


def _read(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the job's log and the probe's report, as far as they exist."""
    log, report = folder / "job.log", folder / "probe.json"
    deadline = time.monotonic() + FILE_SECONDS
    while not (log.is_file() and "doctor: srun" in log.read_text(errors="replace")) and time.monotonic() < deadline:
        if log.is_file() and "doctor: setup" not in log.read_text(errors="replace"):
            break
        time.sleep(POLL_SECONDS)
    text = log.read_text(errors="replace") if log.is_file() else ""
    return text, json.loads(report.read_text()) if report.is_file() else {}


def read_report(requested: Resources, shared: Path, log: str, report: dict[str, Any]) -> Iterator[Check]:
    """Turn the log of the job and the report of the probe into lines of the table."""
    lines = log.splitlines()
    found = dict(line.removeprefix("doctor: ").partition(" ")[::2] for line in lines if line.startswith("doctor: "))
    own = [line for line in lines if line.strip() and not line.startswith("doctor: ")]
    last = " / ".join(own[-3:]) or "no output"
    if "token" not in found:
        where = f"on node {found['node']}" if "node" in found else "the job ended without a log, so the node"
        yield Check(
            "shared folder",
            "failed",
            f"{shared}: {where} does not see this folder's files",
            "Use a folder on a file system that login and compute nodes share (--folder), and submit sweeps there.",
        )
        return
    yield Check("test job", "ok", f"ran on {found['node']}")
    yield Check("shared folder", "ok", f"the node sees {shared.absolute()}")
    if "scontrol" in found:
        yield Check("requeue", "ok", "scontrol answers on the node, so the batch script can requeue its job")
    else:
        advice = "Ask the site for it. Until then restart preempted runs with `mgcc slurm resume`."
        yield Check("requeue", "failed", f"scontrol does not work on the node: {last}", advice)
    if "setup" not in found:
        what = f"the job ended before its program: {last}"
        yield Check("setup", "failed", what, "Correct `modules`, `scratch`, `node_setup` or `setup`.")
        return
    if requested.modules or requested.setup or requested.node_setup:
        yield Check("setup", "ok", "modules and setup lines ran")
    if requested.scratch:
        if "scratch" in found:
            yield Check("scratch", "ok", f"{found['scratch']} is writable")
        else:
            yield Check("scratch", "failed", f"{requested.scratch}: {last}", "Choose another `scratch`, or drop it.")
    container = list(_container(requested, found, last))
    yield from container
    if not report:
        if any(check.state == "failed" for check in container):
            return
        advice = "Check that this Python exists on the nodes, or use a container (docs/how-to/containers.md)."
        what = f"Python did not start (exit code {found.get('srun', 'unknown')}): {last}"
        yield Check("srun", "failed", what, "Correct `container`." if requested.container else advice)
        return
    yield Check("srun", "ok", f"started a task{' in the container' if requested.container else ''}")
    yield from _python(requested, report, last)
    if "errors" not in report:  # the probe crashed, so it could not wait for the signal
        return
    seconds = report["signal_seconds"]
    if seconds is not None:
        yield Check("signal", "ok", f"SIGUSR2 arrived {seconds:.0f} s after the start, before the time limit")
    else:
        what = f"no SIGUSR2 before the time limit (srun's exit code {found.get('srun', 'unknown')})"
        yield Check("signal", "failed", what, "Runs would end without a checkpoint. Ask the site about --signal.")


def _container(requested: Resources, found: dict[str, str], last: str) -> Iterator[Check]:
    if not (container := requested.container):
        return
    if container.runtime != "pyxis" and "runtime" not in found:
        advice = f"Load its module: `modules: [{container.runtime}]`."
        yield Check("container", "failed", f"{container.runtime} is not on the node: {last}", advice)
    elif container.image_file and "image" not in found:
        advice = "Copy it to a folder that the nodes share."
        yield Check("container", "failed", f"{container.image_file} does not exist on the node", advice)
    elif "unrecognized option '--container-image" in last:
        advice = "Use apptainer or singularity, or ask the site for Pyxis."
        yield Check("container", "failed", "srun has no option --container-image, so Pyxis is not installed", advice)
    else:
        yield Check("container", "ok", f"{found.get('runtime', container.runtime)}, {container.image}")


def _python(requested: Resources, report: dict[str, Any], last: str) -> Iterator[Check]:
    name = f"{report['python']} ({report['executable']})"
    if "errors" not in report:
        problem = f"{name} crashed, or the job's time limit ended it, while it imported the packages: {last}"
        yield Check(
            "Python", "failed", problem, "Try again if the node was busy. Otherwise install the packages again."
        )
        return
    source = "Rebuild the image." if requested.container else "Install the same versions on both sides."
    if report["errors"]:
        texts = "; ".join(f"import {module}: {error}" for module, error in report["errors"].items())
        yield Check("Python", "failed", f"{name}: {texts}", source)
        return
    different = [
        f"{package} {theirs or 'missing'} (here {own})"
        for package, theirs in report["versions"].items()
        if (own := _version(package)) and _public(theirs) != _public(own)
    ]
    if different:
        yield Check("Python", "warning", f"{name}: {', '.join(different)}", source)
    else:
        yield Check("Python", "ok", f"{name}, torch {report['versions']['torch']}, same versions as here")
    if requested.gpu_count:
        if report["gpus"]:
            yield Check("GPUs in job", "ok", f"torch sees {report['gpus']} (CUDA {report['cuda']})")
        else:
            build = f"is built for CUDA {report['cuda']}" if report["cuda"] else "is a build for CPUs"
            advice = "Install a build of torch that fits the node's driver, or ask for GPUs in another way (`gres`)."
            yield Check("GPUs in job", "failed", f"torch {build} and sees no GPU", advice)


def _public(text: str | None) -> str:
    """Return a version without its local part: a login node may have torch's build for CPUs."""
    return (text or "").partition("+")[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
