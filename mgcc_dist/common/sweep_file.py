"""Sweep files: the rows of a results table x data sets x seeds, and the steps that prepare their data.

A sweep file holds:

    title: what the table compares
    paper: table_I              # table of configs/paper/tables.yaml to compare with; null for none
    out: out/sweeps/table_1     # run folders: OUT/DATASET/ROW/seed_K-HASH; the hash is of the preset and the keys
    preset: mgcc_busi           # the config of `segment` that the keys below override
    reference: MGCC             # the row that the others are tested against; null for none
    seeds: [1, 2, 3]            # training seeds; an empty list means no runs, and then no data sets are needed
    splits: [1, 2, 3]           # one split per seed; default: the seed's number, as in the paper's three runs
    resources: {...}            # cluster resources per run (docs/how-to/cluster.md); also allowed per row and data set
    defaults: {loop: {...}}     # keys of `segment` for all runs
    datasets:                   # keys of `segment` per data set; {split} and {seed} are substituted
      BUSI: {paper: BUSI, data: {shards: out/busi, split: "busi_random_{split}"}, prepare: {...}}
    rows:                       # keys of `segment` per row; they override the data set's, which override defaults
      U-Net: {method: {name: supervised}, network: {name: unet}}
    notes: scope and limitations of the table

`prepare` lists the programs that create a data set's inputs, in order. An entry that names several stages runs once per
stage, with {stage} substituted. A step or run depends on the earlier steps whose outputs appear in its command.

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

SWEEP_KEYS = {
    *("title", "paper", "out", "preset", "reference", "seeds", "splits", "resources", "defaults", "datasets", "rows"),
    "notes",
}
REQUIRED_KEYS = ("title", "out", "preset", "seeds", "rows")
SEGMENT_SECTIONS = ("data", "loop", "method", "network")
STEP_KEYS = {"run", "makes", "resources"}
# Keys that do not affect a run's result, so a run may differ from the sweep file in them.
RESULT_NEUTRAL_KEYS = {"out", "data.workers", "loop.log_every", "loop.checkpoint_every", "loop.keep_checkpoints"}


@dataclass(frozen=True)
class SweepRun:
    row: str
    """row name: "U-Net", "MGCC", ..."""
    dataset: str
    """key of `datasets` in the sweep file"""
    split: int
    seed: int
    preset: str
    """the config of `segment` that `config` overrides"""
    config: dict[str, Any]
    """keys of `segment`, nested, without `out`"""
    folder: Path
    """run folder; its name ends in a hash of preset and config, so each config has its own folder"""
    resources: dict[str, Any] = field(default_factory=dict)
    """cluster resources from the sweep file, read by `mgcc_dist.slurm`"""

    def command(self) -> list[str]:
        """Return the arguments after `python` (or `accelerate launch`) that start this run."""
        keys = {**flatten(self.config), "out": str(self.folder)}
        return ["-m", "mgcc_dist.segment", "--preset", self.preset, *as_arguments(keys)]

    def training_length(self) -> tuple[str, float] | None:
        """Return ("epochs", 300) or ("steps", 20000), or None if neither the preset nor the sweep sets one."""
        keys = _preset(self.preset) | flatten(self.config)
        return next(((unit, keys[f"loop.{unit}"]) for unit in ("epochs", "steps") if keys.get(f"loop.{unit}")), None)


@dataclass(frozen=True)
class SweepStep:
    """A program that must finish before runs can start: shards, a split file, one stage of a diffusion model."""

    name: str
    """data set, entry of `prepare`, stage and split: "busi/shards", "busi/ldm-autoencoder-split_1", ..."""
    kind: str
    """entry and stage, the same for all splits: "shards", "ldm autoencoder", ..."""
    chain: str
    """entry and split, such as "busi/ldm-split_1"; the stages of a chain run in order"""
    arguments: tuple[str, ...]
    """program and options: ("ldm", "--preset", "busi", ...)"""
    output: Path
    """the file whose existence marks the step as done"""
    resources: dict[str, Any]

    def command(self) -> list[str]:
        """Return the arguments after `python` that start this step."""
        program, *options = self.arguments
        return ["-m", f"mgcc_dist.{program}", *options]


@dataclass(frozen=True)
class Sweep:
    name: str
    """the file's stem"""
    title: str
    paper: str | None
    """key in configs/paper/tables.yaml"""
    reference: str | None
    """the row that the others are tested against"""
    out: Path
    rows: dict[str, dict[str, Any]]
    """row name -> its keys of `segment`, nested"""
    columns: dict[str, str]
    """data set -> column of the paper's table"""
    runs: list[SweepRun]
    """ordered by seed, then data set, then row"""
    steps: list[SweepStep]
    """steps of `prepare`, without duplicates, each after its dependencies"""
    notes: str


def read_sweep(path: Path) -> Sweep:
    """Read and expand a sweep file.

    Raises:
        UserError: the file does not exist or is not YAML, or a key is missing, unknown or has a value of the wrong
            type; the message names the file and the key.
    """
    content = _load(path)
    seeds, rows = content["seeds"], content["rows"]
    datasets = content.get("datasets") or {}
    splits = content.get("splits", seeds)
    for key, numbers in (("seeds", seeds), ("splits", splits)):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise UserError(f"{path}: {key} must be a list of integers like [1, 2, 3], got {numbers}")
    if len(splits) != len(seeds):
        raise UserError(f"{path}: got {len(splits)} splits for {len(seeds)} seeds. Give one split per seed.")
    if repeated := [seed for seed, count in Counter(seeds).items() if count > 1]:
        raise UserError(f"{path}: seed {repeated[0]} appears more than once")
    if seeds:
        _check_names(path, "datasets", datasets)
    _check_names(path, "rows", rows)
    columns = {name: str(keys.get("paper", name)) for name, keys in datasets.items()}
    reference = content.get("reference")
    if reference is not None and reference not in rows:
        raise UserError(f"{path}: reference {reference!r} is not a row. Choose one of: {', '.join(rows)}.")

    not_of_segment = ("paper", "prepare", "resources")
    named = {f"datasets.{name}": keys for name, keys in datasets.items()}
    named |= {f"rows.{name}": keys for name, keys in rows.items()}
    resources = {section: _read_resources(path, section, keys) for section, keys in (("", content), *named.items())}
    layers = {"defaults": content.get("defaults") or {}}
    layers |= {section: {k: v for k, v in keys.items() if k not in not_of_segment} for section, keys in named.items()}
    for section, layer in layers.items():
        _check_sections(path, section, layer)

    out, preset = Path(content["out"]), content["preset"]
    runs = []
    for seed, split in zip(seeds, splits, strict=True):
        for dataset in datasets:
            for row in rows:
                config: dict[str, Any] = {"loop": {"seed": seed}}
                for section in ("defaults", f"datasets.{dataset}", f"rows.{row}"):
                    config = _merge(config, layers[section])
                config = _substitute(path, config, split=split, seed=seed)
                folder = out / slug(dataset) / slug(row) / f"seed_{seed}-{_config_hash(preset, config)}"
                requested = resources[""] | resources[f"datasets.{dataset}"] | resources[f"rows.{row}"]
                runs.append(SweepRun(row, dataset, split, seed, preset, config, folder, requested))
    steps: dict[tuple[str, ...], SweepStep] = {}
    for dataset, keys in datasets.items():
        for seed, split in zip(seeds, splits, strict=True):
            for step in _expand_steps(path, dataset, keys.get("prepare") or {}, split, seed):
                steps.setdefault(step.arguments, step)
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
    """Return a name as a folder name: lower case, with hyphens for everything but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def as_arguments(keys: dict[str, Any]) -> list[str]:
    """Return dotted keys and values as command-line options, `--key=value`."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        shipped = ", ".join(sorted(f"configs/sweeps/{file.name}" for file in (CONFIGS / "sweeps").glob("*.yaml")))
        raise UserError(f"{path}: file not found. Shipped sweep files: {shipped}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a sweep file. See `mgcc sweep --help` for the format.")
    if unknown := sorted(map(str, content.keys() - SWEEP_KEYS)):
        raise UserError(f"{path}: unknown key {unknown[0]!r}. Known keys: {', '.join(sorted(SWEEP_KEYS))}.")
    if missing := [key for key in REQUIRED_KEYS if content.get(key) is None]:
        raise UserError(f"{path}: key {missing[0]!r} is missing")
    for key in ("title", "out", "preset"):
        if not isinstance(content[key], str):
            raise UserError(f"{path}: {key} must be a string, got {content[key]!r}")
    return content


def _check_names(path: Path, key: str, named: Any) -> None:
    if not isinstance(named, dict) or not named or not all(isinstance(keys, dict) for keys in named.values()):
        raise UserError(f"{path}: {key} must be a mapping from names to keys of `segment`")
    for folder, count in Counter(slug(str(name)) for name in named).items():
        if count > 1 or not folder:
            names = " and ".join(repr(name) for name in named if slug(str(name)) == folder)
            raise UserError(f"{path}: {key} {names} would use the folder name {folder!r}. Rename one.")


def _check_sections(path: Path, section: str, layer: Any) -> None:
    """Check section names only; `segment` checks the keys below them."""
    if not isinstance(layer, dict):
        raise UserError(f"{path}: {section} must hold keys of `segment`, got {layer!r}")
    for name, keys in layer.items():
        if name not in SEGMENT_SECTIONS or not isinstance(keys, dict):
            raise UserError(f"{path}: {section}.{name} is not one of the sections {', '.join(SEGMENT_SECTIONS)}")


def _merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in override.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else copy.deepcopy(value)
    return merged


def _substitute(path: Path, value: Any, **names: Any) -> Any:
    """Replace {split}, {seed} and, in steps, {stage} in all strings of a config."""
    if isinstance(value, dict):
        return {key: _substitute(path, item, **names) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(path, item, **names) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return value.format(**names)
    except (KeyError, IndexError, ValueError) as error:
        *first, last = (f"{{{name}}}" for name in names)
        raise UserError(
            f"{path}: unknown placeholder in {value!r} ({error}). Available: {', '.join(first)} and {last}."
        ) from error


def _expand_steps(path: Path, dataset: str, prepare: Any, split: int, seed: int) -> Iterator[SweepStep]:
    """Yield the steps of a data set's `prepare` for one split and seed."""
    section = f"{path}: datasets.{dataset}.prepare"
    if not isinstance(prepare, dict):
        raise UserError(f"{section} must be a mapping from names to steps")
    for name, step in prepare.items():
        if not isinstance(step, dict) or not isinstance(step.get("run"), str) or not step.get("makes"):
            raise UserError(f"{section}.{name} needs `run`, a command, and `makes`, the file that it writes last")
        if unknown := sorted(step.keys() - STEP_KEYS):
            known = ", ".join(sorted(STEP_KEYS))
            raise UserError(f"{section}.{name}: unknown key {unknown[0]!r}. Known keys: {known}.")
        stages = step["makes"] if isinstance(step["makes"], dict) else {"": step["makes"]}
        used = [f"{key}_{value}" for key, value in (("split", split), ("seed", seed)) if f"{{{key}}}" in step["run"]]
        chain = "-".join([f"{slug(dataset)}/{slug(name)}", *used])
        for stage, output in stages.items():
            names = {"split": split, "seed": seed, "stage": stage}
            arguments = tuple(_substitute(path, word, **names) for word in shlex.split(step["run"]))
            kind = f"{name} {stage}".strip()
            full_name = "-".join([f"{slug(dataset)}/{slug(kind)}", *used])
            yield SweepStep(
                full_name,
                kind,
                chain,
                arguments,
                Path(_substitute(path, str(output), **names)),
                _read_resources(path, name, step),
            )


def _read_resources(path: Path, section: str, layer: dict[str, Any]) -> dict[str, Any]:
    resources = layer.get("resources") or {}
    if not isinstance(resources, dict):
        raise UserError(f"{path}: {section}{'.' if section else ''}resources must be a mapping, got {resources!r}")
    return resources


@functools.cache
def _preset(name: str) -> dict[str, Any]:
    """Return the flattened keys of a shipped config of `segment`; {} for an unknown name, which `segment` reports."""
    path = CONFIGS / "segment" / f"{name}.yaml"
    return flatten(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _config_hash(preset: str, config: dict[str, Any]) -> str:
    """Return eight hex digits that identify the keys that affect the result."""
    keys = {k: v for k, v in (_preset(preset) | flatten(config)).items() if k not in RESULT_NEUTRAL_KEYS}
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:8]
