"""What a job asks of the cluster: read from presets.yaml, a cluster file and the sweep file, in this order."""

import dataclasses
import functools
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mgcc_dist.common.errors import UserError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Resources:
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    """nodes not to use"""
    nodes: int = 1
    tasks_per_node: int = 1
    """ranks a node; a GPU run has one a GPU"""
    gpus: int = 0
    """a node"""
    cpus: int = 2
    """a task"""
    memory_gb: float | None = None
    """a node; None takes the partition's default"""
    time: str = "1:00:00"
    """in one of Slurm's forms: minutes, hours:minutes:seconds, days-hours, days-hours:minutes:seconds"""
    signal_seconds: int = 120
    """how long before the time limit a run is told to save and requeue"""
    parallel: int = 256
    """members of an array that run at a time"""
    attempts: int = 3
    """starts of a run, one after the other without progress, after which it is not started again"""
    runs_per_gpu: int = 1
    """runs of a sweep that share a task and its GPU, each a process; `cpus` and `memory_gb` are of one run"""
    environment: dict[str, str] = field(default_factory=dict)
    """variables of the job, such as OMP_NUM_THREADS or Accelerate's"""
    setup: list[str] = field(default_factory=list)
    """shell lines before the run: module load ..."""
    extra: dict[str, Any] = field(default_factory=dict)
    """further options of sbatch, without the dashes: {reservation: mri, exclusive: true}"""

    @property
    def minutes(self) -> int:
        return minutes(self.time)

    def of_runs(self, number: int) -> "Resources":
        """What a task of `number` runs asks for."""
        memory = None if self.memory_gb is None else self.memory_gb * number
        return dataclasses.replace(self, cpus=self.cpus * number, memory_gb=memory)

    def sbatch(self) -> dict[str, Any]:
        """As parameters of submitit's Slurm executor; what is None is left to Slurm."""
        exports = [f"export {key}={shlex.quote(value)}" for key, value in sorted(self.environment.items())]
        parameters = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "gpus_per_node": self.gpus or None,
            "cpus_per_task": self.cpus,
            "mem": f"{round(self.memory_gb * 1024)}M" if self.memory_gb else None,
            "time": self.minutes,
            "signal_delay_s": self.signal_seconds,
            "array_parallelism": self.parallel,
            "setup": [*exports, *self.setup] or None,
            # A rank that dies takes the others along; they would wait for it until the time limit.
            "srun_args": ["--kill-on-bad-exit=1"],
        }
        # Slurm starts a job again when its node dies, and drops it when what it waits for has failed.
        extra = {"requeue": True, "kill-on-invalid-dep": "yes", **self.extra}
        return {key: value for key, value in parameters.items() if value is not None} | {"additional_parameters": extra}

    def __str__(self) -> str:
        ranks = (
            f"{self.nodes} node{'s' * (self.nodes > 1)} x {self.tasks_per_node} rank{'s' * (self.tasks_per_node > 1)}"
        )
        named = ("partition", "account", "qos", "constraint", "exclude")
        words = [ranks, f"{self.cpus} CPUs a rank", f"{self.gpus} GPUs a node" if self.gpus else "no GPU"]
        words += [f"{self.memory_gb:g} GB"] if self.memory_gb else []
        words += [self.time, *(f"{key} {value}" for key in named if (value := getattr(self, key)))]
        return ", ".join(words)


FIELDS = {each.name: each for each in dataclasses.fields(Resources)}
KINDS: dict[str, tuple[type, ...]] = {
    str(int): (int,),
    str(str | None): (str, type(None)),
    str(float | None): (int, float, type(None)),
    str(dict[str, str]): (dict,),
    str(dict[str, Any]): (dict,),
    str(list[str]): (list,),
}


def read(layers: Iterable[tuple[str, dict[str, Any]]]) -> Resources:
    """Resources of (place, keys) pairs; later ones win, `environment`, `extra` are merged.

    Raises:
        UserError: a key is unknown or its value is of a wrong kind; names place and key.
    """
    values: dict[str, Any] = {}
    layers = list(layers)
    for place, keys in layers:
        for key, value in keys.items():
            if key not in FIELDS:
                raise UserError(f"{place}: unknown resource {key!r}; there are {', '.join(FIELDS)}")
            _check(place, key, value)
            values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    wanted = Resources(**values)
    if wanted.runs_per_gpu > 1 and (wanted.nodes > 1 or wanted.tasks_per_node > 1 or wanted.gpus > 1):
        place = next(place for place, keys in reversed(layers) if "runs_per_gpu" in keys)
        raise UserError(f"{place}: runs_per_gpu {wanted.runs_per_gpu} is for runs of one rank on one GPU, not {wanted}")
    return wanted


def preset_defaults(words: list[str]) -> dict[str, Any]:
    """What presets.yaml has for a program's command: by its preset, else by the program."""
    known = _presets()
    program = words[1].rpartition(".")[2]
    presets = [after for word, after in zip(words, [*words[1:], ""], strict=True) if word == "--preset"]
    return known.get(f"{program} {presets[0]}" if presets else program, {})


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((HERE / "presets.yaml").read_text())


def cluster_file(name: str) -> dict[str, Any]:
    """Keys of a cluster file: a path, or the name of one in slurm/clusters.

    Raises:
        UserError: there is none, or it does not hold a mapping.
    """
    path = Path(name)
    if not path.is_file():
        path = HERE / "clusters" / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in (HERE / "clusters").glob("*.yaml")))
        raise UserError(f"{name} is no file, and none of the shipped cluster files {shipped}")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping of resources, such as `partition: gpu`")
    return content


def minutes(time: str) -> int:
    """A time limit in Slurm's forms, in minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise UserError(f'{time!r} is no time limit; write minutes, "hours:minutes:seconds" or "days-hours:minutes"')
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


def _check(place: str, key: str, value: Any) -> None:
    if key == "time":
        if not isinstance(value, str):  # YAML reads 1:00:00 without quotes as the number 3600
            raise UserError(f'{place}: time must be a text in quotes, like "12:00:00", got {value!r}')
        minutes(value)
        return
    wanted = KINDS[str(FIELDS[key].type)]
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise UserError(f"{place}: {key} is of another kind than {value!r}")
    least = 0 if key == "gpus" else 1
    if isinstance(value, int) and value < least:
        raise UserError(f"{place}: {key} must be {least} or more, got {value}")
