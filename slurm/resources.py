"""Cluster resources of a job, merged from presets.yaml, the cluster file and the sweep file, in this order."""

import dataclasses
import functools
import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mgcc_dist.common.config import CONFIGS, read_yaml
from mgcc_dist.common.errors import UserError, did_you_mean
from mgcc_dist.common.presets import base_names
from mgcc_dist.slurm.container import Container, read_container

SLURM_FOLDER = Path(__file__).parent
ON_EVERY_NODE = 'srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES"'
GPUS = re.compile(r"([\w.-]+:)?\d+")
"""a count of GPUs, with or without a type"""
GPU_GRES = re.compile(r"\bgpu(?::[a-zA-Z][\w.-]*)?(?::(\d+))?(?=,|\(|$)")
"""GPUs among generic resources; a count that is missing is 1"""
TMPDIR = "mgcc-$SLURM_JOB_ID"
BATCH_SIGNALS = ("USR2", "TERM")
OTHER_NAMES = {"mem": "memory_gb", "cpus-per-task": "cpus", "ntasks-per-node": "tasks_per_node"}
"""options of sbatch that have a key of another name"""
OWN_OPTIONS = {
    *("array", "dependency", "error", "job-name", "kill-on-invalid-dep", "no-requeue", "open-mode", "output"),
    *("parsable", "requeue", "signal", "test-only", "wrap"),
}
"""options of sbatch on which submitting, requeueing and `mgcc slurm status` rely"""


@dataclass(frozen=True)
class Resources:
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    """nodes to exclude"""
    nodelist: str | None = None
    """nodes to use"""
    licenses: str | None = None
    """licenses to hold: "matlab:2" """
    wckey: str | None = None
    """workload characterization key; None: none is sent"""
    gres: str | None = None
    """generic resources per node, requested instead of `gpus`: "gpu:a100:2" """
    nodes: int = 1
    tasks_per_node: int = 1
    """ranks per node; use one per GPU"""
    gpus: int | str = 0
    """GPUs per node, also of a type: "a100:2" """
    cpus: int = 2
    """CPUs per rank"""
    memory_gb: float | None = None
    """memory per node; None: the partition's default"""
    time: str = "1:00:00"
    """time limit in a Slurm format: minutes, hours:minutes:seconds, days-hours, days-hours:minutes:seconds"""
    signal_seconds: int = 120
    """seconds before the time limit at which a run is signalled to save and requeue"""
    parallel: int = 256
    """maximum number of array tasks that run at the same time"""
    max_submitted: int | None = None
    """number of tasks that you may have in the queue (the site's MaxSubmitJobs); None: no limit"""
    attempts: int = 3
    """consecutive starts without progress after which a run is not started again"""
    runs_per_gpu: int = 1
    """runs of a sweep that are packed into one task on one GPU, each a process; `cpus` and `memory_gb` are per run"""
    environment: dict[str, str] = field(default_factory=dict)
    """environment variables of the job, such as OMP_NUM_THREADS or Accelerate's"""
    modules: list[str] = field(default_factory=list)
    """environment modules to load, in this order; the job ends if one does not exist"""
    setup: list[str] = field(default_factory=list)
    """shell lines before the run, on the first node"""
    node_setup: list[str] = field(default_factory=list)
    """shell lines before the run, once on every node, in a shell of their own; the job ends if they fail"""
    scratch: str | None = None
    """folder on the nodes' own disks, such as /local/$USER: every node gets a new folder in it, the job's TMPDIR,
    which is removed after the job"""
    container: Container | None = None
    """container in which the programs run; the lines of `setup` and `node_setup` run outside"""
    srun_args: list[str] = field(default_factory=list)
    """further options of srun, with the dashes: ["--mpi=none"]"""
    extra: dict[str, Any] = field(default_factory=dict)
    """further options of sbatch, without the dashes: {reservation: mri, exclusive: true}"""

    @property
    def minutes(self) -> int:
        return to_minutes(self.time)

    @property
    def gpu_count(self) -> int:
        """GPUs per node, of any type."""
        if self.gres:
            return sum(int(count or 1) for count in GPU_GRES.findall(self.gres))
        return self.gpus if isinstance(self.gpus, int) else int(self.gpus.rpartition(":")[2])

    def for_packed_runs(self, count: int) -> "Resources":
        """Return the resources of a task with `count` runs."""
        memory = None if self.memory_gb is None else self.memory_gb * count
        return dataclasses.replace(self, cpus=self.cpus * count, memory_gb=memory)

    def executor_parameters(self) -> dict[str, Any]:
        """Return the parameters of submitit's SlurmExecutor."""
        return self._allocation() | {
            "wckey": self.wckey,  # without one, submitit would send its own
            "signal_delay_s": self.signal_seconds,
            "array_parallelism": self.parallel,
            "setup": self._setup_lines(),
            # If a rank dies, stop the others, which would wait for it until the time limit.
            # Since Slurm 22.05, srun does not inherit --cpus-per-task.
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus}", *self.srun_args],
            "additional_parameters": self._additional(),
        }

    def teardown_lines(self) -> list[str]:
        """Return the shell lines that end the batch script, after the code of srun is known."""
        # Not "$TMPDIR", which lines of `setup` may have changed to a folder that is not the job's.
        return [f'{ON_EVERY_NODE} rm -rf "{self.scratch}/{TMPDIR}"'] if self.scratch else []

    def _setup_lines(self) -> list[str]:
        """Return the shell lines that start the batch script."""
        # srun and its ranks receive these signals; bash has to wait for them and then requeue the job.
        lines = [f"trap : {' '.join(BATCH_SIGNALS)}"]
        lines += [f"module load {shlex.quote(module)} || exit" for module in self.modules]
        if self.container:  # whose Python must not import packages of another one: from a module, or in ~/.local
            lines += ["unset PYTHONPATH PYTHONHOME", "export PYTHONNOUSERSITE=1"]
        lines += [f"export {key}={shlex.quote(value)}" for key, value in sorted(self.environment.items())]
        if self.scratch:
            lines += [
                f'export TMPDIR="{self.scratch}/{TMPDIR}"',
                f'{ON_EVERY_NODE} mkdir -p "$TMPDIR" || exit',
            ]
        if self.node_setup:
            script = shlex.quote("\n".join(["set -e", *self.node_setup]))
            lines.append(f"{ON_EVERY_NODE} bash -c {script} || exit")
        return [*lines, *self.setup]

    def sbatch_options(self) -> list[str]:
        """Return the allocation as command-line options of sbatch."""
        own = {"wckey": self.wckey} if self.wckey else {}
        options = {
            key.replace("_", "-"): value for key, value in (self._allocation() | own | self._additional()).items()
        }
        return [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]

    def _allocation(self) -> dict[str, Any]:
        allocation = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "nodelist": self.nodelist,
            "gres": self.gres,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "gpus_per_node": self.gpus if self.gpu_count and not self.gres else None,
            "cpus_per_task": self.cpus,
            "mem": f"{round(self.memory_gb * 1024)}M" if self.memory_gb else None,
            "time": self.minutes,
        }
        return {key: value for key, value in allocation.items() if value is not None}

    def _additional(self) -> dict[str, Any]:
        # Slurm restarts a job whose node dies, and cancels a job whose dependency has failed.
        licenses = {"licenses": self.licenses} if self.licenses else {}
        return {"requeue": True, "kill-on-invalid-dep": "yes", **licenses, **self.extra}

    def __str__(self) -> str:
        nodes = f"{self.nodes} node{'s' * (self.nodes > 1)}"
        ranks = f"{self.tasks_per_node} rank{'s' * (self.tasks_per_node > 1)}"
        named = ("partition", "account", "qos", "constraint", "exclude", "nodelist", "licenses")
        gpus = f"{self.gpus} GPUs per node" if self.gpu_count else "no GPU"
        words = [
            f"{nodes} x {ranks}",
            f"{self.cpus} CPUs per rank",
            f"gres {self.gres}" if self.gres else gpus,
        ]
        words += [f"{self.memory_gb:g} GB"] if self.memory_gb else []
        words += [f"in {self.container.image} ({self.container.runtime})"] if self.container else []
        words += [self.time, *(f"{key} {value}" for key in named if (value := getattr(self, key)))]
        return ", ".join(words)


FIELDS = {field.name: field for field in dataclasses.fields(Resources)}
ACCEPTED_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    str(int): ((int,), "an integer"),
    str(int | str): ((int, str), "an integer"),
    str(int | None): ((int, type(None)), "an integer"),
    str(str | None): ((str, type(None)), "a string"),
    str(float | None): ((int, float, type(None)), "a number"),
    str(dict[str, str]): ((dict,), "a mapping"),
    str(dict[str, Any]): ((dict,), "a mapping"),
    str(Container | None): ((dict, type(None)), "a mapping or null"),
    str(list[str]): ((list,), "a list"),
}


def merge_resources(layers: Iterable[tuple[str, dict[str, Any]]]) -> Resources:
    """Merge (source, keys) pairs; later pairs override earlier ones, except that mappings are merged.

    Raises:
        UserError: a key is unknown or its value has the wrong type; the message names source and key.
    """
    values: dict[str, Any] = {}
    layers = list(layers)
    for source, keys in layers:
        for key, value in keys.items():
            if key not in FIELDS:
                known = f"Known resources: {', '.join(FIELDS)}."
                raise UserError(f"{source}: unknown resource {key!r}.{did_you_mean(key, FIELDS)} {known}")
            _check(source, key, value)
            values[key] = (values.get(key) or {}) | value if isinstance(value, dict) else value
    values["environment"] = {name: str(value) for name, value in values.get("environment", {}).items()}
    if values.get("container"):
        source = next(source for source, keys in reversed(layers) if keys.get("container"))
        values["container"] = read_container(source, values["container"])
    merged = Resources(**values)
    if 0 < merged.minutes * 60 <= merged.signal_seconds:
        source = next(source for source, keys in reversed(layers) if keys.keys() & {"time", "signal_seconds"})
        raise UserError(
            f"{source}: signal_seconds {merged.signal_seconds} is not shorter than time {merged.time}, so a run would "
            "be stopped when it starts. Raise time, or lower signal_seconds."
        )
    if merged.runs_per_gpu > 1 and (merged.nodes > 1 or merged.tasks_per_node > 1 or merged.gpu_count > 1):
        source = next(source for source, keys in reversed(layers) if "runs_per_gpu" in keys)
        raise UserError(
            f"{source}: runs_per_gpu {merged.runs_per_gpu} needs one rank and at most one GPU, got {merged}"
        )
    return merged


@functools.cache
def program_defaults(program: str, preset: str | None = None) -> dict[str, Any]:
    """Return the entry of presets.yaml for a program, overridden by those of the preset's bases and of the preset."""
    entries = _presets()
    names = base_names(CONFIGS / program, preset) if preset else []
    defaults = dict(entries.get(program, {}))
    for name in names:
        defaults |= entries.get(f"{program} {name}", {})
    return defaults


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((SLURM_FOLDER / "presets.yaml").read_text())


def load_cluster_file(name: str) -> dict[str, Any]:
    """Read a cluster file: a path, or the name of a file in slurm/clusters.

    Raises:
        UserError: the file does not exist or does not hold a mapping.
    """
    path = Path(name)
    if not path.is_file():
        path = SLURM_FOLDER / "clusters" / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in (SLURM_FOLDER / "clusters").glob("*.yaml")))
        raise UserError(f"{name}: no such cluster file. Pass a path, or one of the shipped files: {shipped}.")
    try:
        return read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML ({error})") from error


def to_minutes(time: str) -> int:
    """Convert a Slurm time limit to minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise UserError(f'time: {time!r} is not a time limit. Use minutes, "hours:minutes:seconds" or "days-hours".')
    days, *rest = (int(part) if part else None for part in match.groups())
    first, second, third = rest
    assert first is not None
    if days is not None:
        seconds = days * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    elif third is not None:
        seconds = first * 3600 + (second or 0) * 60 + third
    else:
        seconds = first * 60 + (second or 0)
    return -(-seconds // 60)


def _check(source: str, key: str, value: Any) -> None:
    if key == "time":
        if not isinstance(value, str):  # YAML reads 1:00:00 without quotes as the number 3600
            raise UserError(f'{source}: time must be a string in quotes, like "12:00:00", got {value!r}')
        try:
            to_minutes(value)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        return
    types, description = ACCEPTED_TYPES[str(FIELDS[key].type)]
    if key == "gpus" and isinstance(value, str) and not GPUS.fullmatch(value):
        raise UserError(f'{source}: gpus must be a number, or a type and a number like "a100:2", got {value!r}')
    if key == "scratch" and isinstance(value, str) and re.search(r'["`\s]|^[^/$]', value):
        raise UserError(f"{source}: scratch must be an absolute path without quotes and spaces, got {value!r}")
    if (
        key == "srun_args"
        and isinstance(value, list)
        and (bad := [arg for arg in value if not str(arg).startswith("-")])
    ):
        raise UserError(f"{source}: srun_args must be options with their dashes, like --mpi=none, got {bad[0]!r}")
    if not isinstance(value, types) or isinstance(value, bool):
        raise UserError(f"{source}: {key} must be {description}, got {value!r}")
    minimum = 0 if key == "gpus" else 1
    if isinstance(value, int) and value < minimum:
        raise UserError(f"{source}: {key} must be at least {minimum}, got {value}")
    if isinstance(value, float) and not 0 < value < math.inf:
        raise UserError(f"{source}: {key} must be positive, got {value}")
    if isinstance(value, list) and (strange := [item for item in value if not isinstance(item, str)]):
        raise UserError(f"{source}: {key} must be a list of strings, got {strange[0]!r}. Put it in quotes.")
    if key == "environment" and isinstance(value, dict):
        _check_environment(source, value)
    if key == "extra" and isinstance(value, dict):
        _check_extra(source, value)


def _check_environment(source: str, environment: dict[Any, Any]) -> None:
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name)):
            raise UserError(f"{source}: environment: {name!r} is not a name of an environment variable")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise UserError(f"{source}: environment: {name} must be a string, got {value!r}. Put it in quotes.")


def _check_extra(source: str, extra: dict[Any, Any]) -> None:
    for name, value in extra.items():
        option = str(name).replace("_", "-")
        if (own := option.replace("-", "_")) in FIELDS or (own := OTHER_NAMES.get(option, "")):
            raise UserError(f"{source}: extra: {name} would replace the key {own}. Set {own} itself.")
        if option in OWN_OPTIONS:
            raise UserError(f"{source}: extra: {name} is set for each job by `mgcc slurm submit`. Remove it.")
        if value is not True and (isinstance(value, bool) or not isinstance(value, (str, int, float))):
            raise UserError(
                f"{source}: extra: {name} must be true, a string or a number, got {value!r}. Leave it out for none."
            )
