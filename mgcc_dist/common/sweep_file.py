"""Sweep files: the rows of a table x data sets x seeds, and what must be prepared before them.

A sweep file holds:

    title: what the table compares
    paper: table_I              # the table of configs/paper/tables.yaml that it stands beside; null if none
    out: out/sweeps/table_1     # run folders: OUT/DATASET/ROW/seed_K-HASH, with the hash of preset and keys
    preset: mgcc_busi           # the config of `segment` that the keys below change
    reference: MGCC             # the row that the others are compared with; null if none
    seeds: [1, 2, 3]            # training seeds; an empty list makes no run and needs no data sets
    splits: [1, 2, 3]           # the split of each; seed k on split k, as the paper's three runs, where left out
    resources: {...}            # what a run asks of a cluster (docs/how-to/cluster.md); also in rows, data sets
    defaults: {loop: {...}}     # keys of `segment` for all runs
    datasets:                   # keys of `segment` for each data set; {split} and {seed} are filled in
      BUSI: {paper: BUSI, data: {shards: out/busi, split: "busi_random_{split}"}, prepare: {...}}
    rows:                       # keys of `segment` for each row; they win over the data set's, which win over defaults
      U-Net: {method: {name: supervised}, network: {name: unet}}
    notes: what the table is and is not

`prepare` of a data set names the programs that make what its runs read, in order; one that names several stages is
started once for each, with {stage} filled in. A step or run waits for those earlier steps whose products it names.

    prepare:
      shards: {run: shards busi --root DIR --out out/busi, makes: out/busi/index.json}
      ldm:
        run: ldm --data.shards out/busi --out out/ldm/busi_{split} --until {stage}
        makes:
          autoencoder: out/ldm/busi_{split}/autoencoder/result.json
          denoiser: out/ldm/busi_{split}/denoiser/result.json
"""

import copy
import functools
import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mgcc_dist.common.config import CONFIGS, flatten
from mgcc_dist.common.errors import UserError

KEYS = {
    *("title", "paper", "out", "preset", "reference", "seeds", "splits", "resources", "defaults", "datasets", "rows"),
    "notes",
}
REQUIRED = ("title", "out", "preset", "seeds", "rows")
SECTIONS = ("data", "loop", "method", "network")
STEP_KEYS = {"run", "makes", "resources"}
# Keys in which a run may differ from what the sweep asks for: they do not change what comes out.
FREE = {"out", "data.workers", "loop.log_every", "loop.checkpoint_every", "loop.keep_checkpoints"}


@dataclass(frozen=True)
class SweepRun:
    row: str
    """as in the table: "U-Net", "MGCC", ..."""
    dataset: str
    """key of `datasets` in the sweep file"""
    split: int
    seed: int
    preset: str
    """the config of `segment` that `config` changes"""
    config: dict[str, Any]
    """keys of `segment`, nested, without `out`"""
    folder: Path
    """run folder; its name ends in a hash of preset and config, so that another config is another folder"""
    resources: dict[str, Any] = field(default_factory=dict)
    """what the sweep file asks of a cluster for this run; read by `mgcc_dist.slurm`"""

    def command(self) -> list[str]:
        """The words after `python` (or `accelerate launch`) that carry this run out."""
        keys = {**flatten(self.config), "out": str(self.folder)}
        return ["-m", "mgcc_dist.segment", "--preset", self.preset, *(f"--{k}={_word(v)}" for k, v in keys.items())]

    def length(self) -> tuple[str, float] | None:
        """("epochs", 300) or ("steps", 20000); None where neither preset nor sweep says so."""
        keys = _preset(self.preset) | flatten(self.config)
        return next(((unit, keys[f"loop.{unit}"]) for unit in ("epochs", "steps") if keys.get(f"loop.{unit}")), None)


@dataclass(frozen=True)
class SweepStep:
    """What must be made before runs: shards, a split file, one stage of a diffusion model."""

    name: str
    """data set, entry of `prepare`, stage, split: "busi/shards", "busi/ldm-autoencoder-split_1", ..."""
    kind: str
    """what the same step of other splits has in common: "shards", "ldm autoencoder", ..."""
    chain: str
    """the stages of one entry, for one split, follow each other: "busi/ldm-split_1" """
    words: tuple[str, ...]
    """the program and its options: ("ldm", "--preset", "busi", ...)"""
    makes: Path
    """the file that says that this is done"""
    resources: dict[str, Any]

    def command(self) -> list[str]:
        """The words after `python` that carry this step out."""
        return ["-m", f"mgcc_dist.{self.words[0]}", *self.words[1:]]


@dataclass(frozen=True)
class Sweep:
    name: str
    """the file's stem"""
    title: str
    paper: str | None
    """key in configs/paper/tables.yaml"""
    reference: str | None
    """the row that the others are compared with"""
    out: Path
    rows: dict[str, dict[str, Any]]
    """row -> its keys of `segment`, nested"""
    columns: dict[str, str]
    """data set -> column of the paper's table"""
    runs: list[SweepRun]
    """every row of every data set with the first seed, then with the second, ..."""
    steps: list[SweepStep]
    """what `prepare` names, each once, in an order in which they can be carried out"""
    notes: str


def read_sweep(path: Path) -> Sweep:
    """Read and expand a sweep file.

    Raises:
        UserError: not there, not YAML, a key is missing, unknown or of a wrong kind; names file and key.
    """
    content = _content(path)
    seeds, rows = content["seeds"], content["rows"]
    datasets = content.get("datasets") or {}
    splits = content.get("splits", seeds)
    for key, numbers in (("seeds", seeds), ("splits", splits)):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise UserError(f"{path}: {key} must be a list of numbers like [1, 2, 3], got {numbers}")
    if len(splits) != len(seeds):
        raise UserError(f"{path}: splits has {len(splits)} numbers, seeds {len(seeds)}; each run takes one of both")
    if repeated := [seed for seed, times in Counter(seeds).items() if times > 1]:
        raise UserError(f"{path}: seeds has {repeated[0]} twice")
    if seeds:
        _check_names(path, "datasets", datasets)
    _check_names(path, "rows", rows)
    columns = {name: str(keys.get("paper", name)) for name, keys in datasets.items()}
    reference = content.get("reference")
    if reference is not None and reference not in rows:
        raise UserError(f"{path}: reference {reference!r} is no row; rows are {', '.join(rows)}")

    apart = ("paper", "prepare", "resources")  # what is not of `segment`
    layers = {"defaults": content.get("defaults") or {}}
    layers |= {f"datasets.{name}": keys for name, keys in datasets.items()}
    layers |= {f"rows.{name}": keys for name, keys in rows.items()}
    resources = {place: _resources(path, place, layer) for place, layer in (("", content), *layers.items())}
    for place, layer in layers.items():
        layers[place] = {k: v for k, v in layer.items() if k not in apart} if place != "defaults" else layer
        _check_keys(path, place, layers[place])

    out, preset = Path(content["out"]), content["preset"]
    runs = []
    for seed, split in zip(seeds, splits, strict=True):
        for dataset in datasets:
            for row in rows:
                config: dict[str, Any] = {"loop": {"seed": seed}}
                for place in ("defaults", f"datasets.{dataset}", f"rows.{row}"):
                    config = _merged(config, layers[place])
                config = _filled(path, config, split=split, seed=seed)
                folder = out / slug(dataset) / slug(row) / f"seed_{seed}-{_hash(preset, config)}"
                asks = resources[""] | resources[f"datasets.{dataset}"] | resources[f"rows.{row}"]
                runs.append(SweepRun(row, dataset, split, seed, preset, config, folder, asks))
    steps: dict[tuple[str, ...], SweepStep] = {}
    for dataset, keys in datasets.items():
        for seed, split in zip(seeds, splits, strict=True):
            for step in _steps(path, dataset, keys.get("prepare") or {}, split, seed):
                steps.setdefault(step.words, step)
    notes = str(content.get("notes") or "").strip()
    return Sweep(
        path.stem,
        content["title"],
        content.get("paper"),
        reference,
        out,
        rows={row: layers[f"rows.{row}"] for row in rows},
        columns=columns,
        runs=runs,
        steps=list(steps.values()),
        notes=notes,
    )


def slug(name: str) -> str:
    """A name as a folder's: lower case, everything but letters and digits as one hyphen."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        shipped = sorted(file.name for file in (CONFIGS / "sweeps").glob("*.yaml"))
        raise UserError(f"{path} is not there; configs/sweeps holds {', '.join(shipped)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a sweep file; see `python -m mgcc_dist.sweeps --help`")
    if unknown := sorted(map(str, content.keys() - KEYS)):
        raise UserError(f"{path}: unknown key {unknown[0]!r}; a sweep has {', '.join(sorted(KEYS))}")
    if missing := [key for key in REQUIRED if content.get(key) is None]:
        raise UserError(f"{path}: key {missing[0]!r} is missing")
    for key in ("title", "out", "preset"):
        if not isinstance(content[key], str):
            raise UserError(f"{path}: {key} must be a text, got {content[key]!r}")
    return content


def _check_names(path: Path, key: str, named: Any) -> None:
    if not isinstance(named, dict) or not named or not all(isinstance(keys, dict) for keys in named.values()):
        raise UserError(f"{path}: {key} must be a mapping of names to keys of `segment`")
    for folder, times in Counter(slug(str(name)) for name in named).items():
        if times > 1 or not folder:
            alike = [name for name in named if slug(str(name)) == folder]
            raise UserError(f"{path}: {key} {' and '.join(map(repr, alike))} would share the folder name {folder!r}")


def _check_keys(path: Path, place: str, layer: Any) -> None:
    """Names of single keys are `segment`'s to check; here only what would be taken for something else."""
    if not isinstance(layer, dict):
        raise UserError(f"{path}: {place} must hold keys of `segment`, got {layer!r}")
    for section, keys in layer.items():
        if section not in SECTIONS or not isinstance(keys, dict):
            raise UserError(f"{path}: {place}.{section} is not one of the sections {', '.join(SECTIONS)}")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _filled(path: Path, value: Any, **names: Any) -> Any:
    """{split} and {seed}, in a step {stage} too, in all texts of a config."""
    if isinstance(value, dict):
        return {key: _filled(path, item, **names) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(path, item, **names) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return value.format(**names)
    except (KeyError, IndexError, ValueError) as error:
        *some, last = (f"{{{name}}}" for name in names)
        raise UserError(f"{path}: {value!r} may hold {', '.join(some)} and {last} only ({error})") from error


def _steps(path: Path, dataset: str, prepare: Any, split: int, seed: int) -> Iterator[SweepStep]:
    """The steps of a data set's `prepare` for one split and seed."""
    place = f"{path}: datasets.{dataset}.prepare"
    if not isinstance(prepare, dict):
        raise UserError(f"{place} must be a mapping of names to steps")
    for name, step in prepare.items():
        if not isinstance(step, dict) or not isinstance(step.get("run"), str) or not step.get("makes"):
            raise UserError(
                f"{place}.{name} needs `run`, a command, and `makes`, the file by which one sees it is done"
            )
        if unknown := sorted(step.keys() - STEP_KEYS):
            raise UserError(f"{place}.{name}: unknown key {unknown[0]!r}; a step has {', '.join(sorted(STEP_KEYS))}")
        stages = step["makes"] if isinstance(step["makes"], dict) else {"": step["makes"]}
        where = [f"{key}_{value}" for key, value in (("split", split), ("seed", seed)) if f"{{{key}}}" in step["run"]]
        chain = "-".join([f"{slug(dataset)}/{slug(name)}", *where])
        for stage, makes in stages.items():
            names = {"split": split, "seed": seed, "stage": stage}
            words = tuple(_filled(path, word, **names) for word in shlex.split(step["run"]))
            kind = f"{name} {stage}".strip()
            full = "-".join([f"{slug(dataset)}/{slug(kind)}", *where])
            product = Path(_filled(path, str(makes), **names))
            yield SweepStep(full, kind, chain, words, product, _resources(path, name, step))


def _resources(path: Path, place: str, layer: dict[str, Any]) -> dict[str, Any]:
    resources = layer.get("resources") or {}
    if not isinstance(resources, dict):
        raise UserError(f"{path}: {place}{'.' if place else ''}resources must be a mapping, got {resources!r}")
    return resources


@functools.cache
def _preset(name: str) -> dict[str, Any]:
    """Keys of a shipped config of `segment`; none where it is not known, which `segment` itself will say."""
    path = CONFIGS / "segment" / f"{name}.yaml"
    return flatten(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _hash(preset: str, config: dict[str, Any]) -> str:
    """Eight hex digits of what makes a run what it is."""
    keys = {key: value for key, value in (_preset(preset) | flatten(config)).items() if key not in FREE}
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:8]


def _word(value: Any) -> str:
    """A value as `segment` reads it from its command line."""
    return value if isinstance(value, str) else json.dumps(value)
