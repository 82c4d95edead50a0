"""The `search` of a sweep file: a space of keys around one row, which Optuna explores.

search:
  row: MGCC
  dataset: BUSI
  seed: 1                   # of every trial; default 1
  split: 1                  # of every trial; default: the seed's number
  workers: 4                # on a cluster, tasks that run trials at the same time
  resources: {...}          # of each worker, in place of those of the row and the data set
  study: {sampler: tpe, pruner: median, trials: 50, metric: iou, direction: maximize, storage: journal}
  space:
    loop.learning_rate: {low: 0.0001, high: 0.1, log: true}
    network.widths: {choices: [[8, 16, 32], [16, 32, 64]]}
    loop.warmup_steps: {low: 0, high: 500, step: 100}
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from mgcc_dist.common.components import import_options, imports_of
from mgcc_dist.common.config import Layer, as_plain, build, resolve, settings_of
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.value_types import Name, NonNegativeInt, PositiveInt
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.sweep.runs import changes, resolve_runs
from mgcc_dist.sweep.schema import SweepFile

PARAMETER_KEYS = ({"low", "high"}, {"low", "high", "log"}, {"low", "high", "step"}, {"choices"})


@dataclass(frozen=True)
class StudyConfig:
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """how the next trial is chosen; grid needs choices or steps"""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """which trials are stopped early, by their validation scores"""
    trials: PositiveInt = 20
    """number of trials; grid: at most all combinations"""
    metric: Literal["iou", "recall", "precision", "f1"] = "iou"
    """of the corrected protocol: per validation for the pruner, of the best step as the trial's value"""
    direction: Literal["maximize", "minimize"] = "maximize"
    storage: Literal["journal", "sqlite"] = "journal"
    """file of the study, OUT/search/study.log or study.db; journal also works on network file systems"""
    seed: NonNegativeInt = 0
    """seed of the sampler"""


@dataclass(frozen=True)
class SearchConfig:
    row: Name
    dataset: Name
    seed: NonNegativeInt = 1
    split: NonNegativeInt | None = None
    workers: PositiveInt = 4
    study: StudyConfig = field(default_factory=StudyConfig)


@dataclass(frozen=True)
class Parameter:
    """A key of the space: numbers between two bounds, or a choice."""

    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def values(self) -> tuple[Any, ...]:
        """All values, or the two bounds of a range without steps."""
        if self.choices:
            return self.choices
        if not self.step:
            return (self.low, self.high)
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self.low + index * self.step for index in range(count))


@dataclass(frozen=True)
class Search:
    path: Path
    """sweep file"""
    preset: str
    config: SearchConfig
    space: dict[str, Parameter]
    base: SegmentConfig
    """the row's config, which each trial changes"""
    folder: Path
    needs: tuple[str, ...]
    """names of the steps that must finish before it starts"""
    resources: dict[str, Any]

    def trial_config(self, number: int, values: Mapping[str, Any]) -> SegmentConfig:
        """Return the config of a trial.

        Raises:
            UserError: the combination of values is impossible.
        """
        layers = [Layer(as_plain(self.base), str(self.path)), Layer(values, f"{self.path}: search.space")]
        out = {"out": str(self.folder / f"trial_{number:04d}")}
        return resolve(SegmentConfig, [*layers, Layer(out)])

    def command(self) -> list[str]:
        """Return the arguments after `python` that start a worker."""
        return ["-m", "mgcc_dist.search", *import_options(), str(self.path)]

    def marker(self, worker: int) -> Path:
        """Return the file that a worker writes when the study has all of its trials."""
        return self.folder / f"worker_{worker}-{self.config.study.trials}_trials.json"

    def as_preset(self, config: SegmentConfig) -> dict[str, Any]:
        """Return a trial's config as the keys of a preset that has the sweep's as its base."""
        plugins = imports_of(config)
        tree: dict[str, Any] = {"base": self.preset} | ({"import": plugins} if plugins else {})
        for key, value in changes(self.preset, config).items():
            if key in ("out", "loop.seed"):
                continue
            *sections, name = key.split(".")
            inner = tree
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[name] = value
        return tree


def read_search(file: SweepFile, chains: Mapping[tuple[str, str, int], tuple[str, ...]]) -> Search | None:
    """Read and check the `search` of a sweep file; None if it has none.

    Args:
        chains: names of the steps of each data set, entry of `prepare` and seed.

    Raises:
        UserError: a key is missing, unknown or has an impossible value, also in the configs of trials.
    """
    if file.search is None:
        return None
    source, config = f"{file.path}: search", _read_config(file)
    for key, name, known in (("row", config.row, file.rows), ("dataset", config.dataset, file.datasets)):
        if name not in known:
            raise UserError(f"{source}.{key}: {name!r} is not in this sweep. Choose one of {', '.join(known)}.")
    space = file.search.get("space")
    if not isinstance(space, dict) or not space:
        raise UserError(f"{source}.space must be a mapping from keys of `segment` to ranges or choices")
    parameters = {key: _read_parameter(f"{source}.space.{key}", value) for key, value in space.items()}
    endless = [key for key, each in parameters.items() if not each.choices and not each.step]
    if config.study.sampler == "grid" and endless:
        raise UserError(f"{source}.space.{endless[0]}: a grid needs choices or a step")
    (base,) = resolve_runs(file, config.dataset, config.row, search_pair(file))
    row, dataset = file.rows[config.row], file.datasets[config.dataset]
    entries = dataset.needs if row.needs is None else row.needs
    steps = [step for entry in entries for step in chains.get((config.dataset, entry, config.seed), ())]
    search = Search(
        file.path,
        file.preset,
        config,
        parameters,
        base,
        file.out / "search",
        tuple(dict.fromkeys(steps)),
        file.resources | (file.search.get("resources") or dataset.resources | row.resources),
    )
    first = {key: each.values[0] for key, each in parameters.items()}
    for key, each in parameters.items():
        for value in (*each.values[:1], *each.values[-1:], *each.choices):
            search.trial_config(0, first | {key: value})
    return search


def search_pair(file: SweepFile) -> list[tuple[int, int]]:
    """Return the (seed, split) of a sweep's search, if it has one."""
    if file.search is None:
        return []
    config = _read_config(file)
    return [(config.seed, config.seed if config.split is None else config.split)]


def grid_size(search: Search) -> int:
    """Return the number of combinations of all values."""
    return prod(len(each.values) for each in search.space.values())


def _read_config(file: SweepFile) -> SearchConfig:
    assert file.search is not None
    tree = {key: value for key, value in file.search.items() if key not in ("space", "resources")}
    settings = settings_of(SearchConfig, [Layer(tree, f"{file.path}: search")])
    if settings.missing:
        raise UserError(f"{file.path}: search: {settings.missing[0].key} is missing")
    return build(SearchConfig, settings)


def _read_parameter(source: str, value: Any) -> Parameter:
    if not isinstance(value, dict) or set(value) not in PARAMETER_KEYS:
        raise UserError(f"{source} must have low and high (and log or step), or choices, got {value!r}")
    if "choices" in value:
        if not isinstance(value["choices"], list) or not value["choices"]:
            raise UserError(f"{source}.choices must be a list of values, got {value['choices']!r}")
        return Parameter(choices=tuple(value["choices"]))
    value = {key: _number(each) for key, each in value.items()}
    numbers = [value["low"], value["high"], value.get("step", 1)]
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
        raise UserError(f"{source}: low, high and step must be numbers, got {value!r}")
    if value["low"] >= value["high"] or numbers[2] <= 0 or (value.get("log") and value["low"] <= 0):
        raise UserError(f"{source}: low must be below high, step positive, and with log low positive, got {value!r}")
    return Parameter(**value)


def _number(value: Any) -> Any:
    """Convert 1e-4, which YAML reads as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
