"""The runs of a sweep: resolved configs, run folders, and commands."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from mgcc_dist.common.components import imports_of
from mgcc_dist.common.config import CONFIGS, Layer, as_plain, flatten, resolve, settings_of
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.identity import digest, identity
from mgcc_dist.common.presets import find_preset, is_file, read_preset
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.sweep.placeholders import has_placeholder, is_text, substitute
from mgcc_dist.sweep.schema import SweepFile, slug
from mgcc_dist.train.saved_run import differences

PRESETS = CONFIGS / "segment"
STARTED = ("result.json", "checkpoints")
"""a folder without any of them holds no run yet"""


@dataclass(frozen=True)
class SweepRun:
    row: str
    """row name: "U-Net", "MGCC", ..."""
    dataset: str
    """key of `datasets` in the sweep file"""
    split: int
    seed: int
    preset: str
    """the config of `segment` that the sweep's keys override"""
    config: SegmentConfig
    folder: Path
    """run folder: the existing one of the same identity, or else a new one whose name ends in the identity's digest"""
    needs: tuple[str, ...]
    """names of the steps that must finish before it starts, direct and indirect ones"""
    resources: dict[str, Any]
    """cluster resources from the sweep file, read by `mgcc_dist.slurm`"""

    def command(self) -> list[str]:
        """Return the arguments after `python` (or `accelerate launch`) that start this run, as a person would."""
        preset = ["--config" if is_file(self.preset) else "--preset", self.preset]
        plugins = [f"--import={module}" for module in imports_of(self.config)]
        return ["-m", "mgcc_dist.segment", *plugins, *preset, *as_arguments(changes(self.preset, self.config))]

    def training_length(self) -> tuple[str, float]:
        """Return ("epochs", 300) or ("steps", 20000)."""
        loop = self.config.loop
        return ("epochs", loop.epochs) if loop.epochs is not None else ("steps", loop.steps or 0)


def resolve_runs(
    file: SweepFile, dataset: str | None, row: str, pairs: Sequence[tuple[int, int]]
) -> list[SegmentConfig]:
    """Return the config of each seed of one row on one data set. Without seeds, only check the row's keys.

    All keys are checked once. The configs of further seeds differ in the seed and in paths and names with placeholders,
    which replace those of the first: checking a thousand configs would take half a minute.
    """
    sections = {"defaults": file.defaults}
    if dataset is not None:
        sections[f"datasets.{dataset}"] = file.datasets[dataset].keys
    sections[f"rows.{row}"] = file.rows[row].keys
    where = f"{file.path}: {row}" + (f" on {dataset}" if dataset else "")

    try:
        preset = _preset(file.preset)
    except UserError as error:
        raise UserError(f"{file.path}: preset: {error}") from error

    def resolved(seed: int, split: int) -> SegmentConfig:
        layers = list(preset)
        for section, keys in sections.items():
            source = f"{file.path}: {section}"
            layers.append(Layer(substitute(source, keys, split=split, seed=seed), source))
        try:
            return resolve(SegmentConfig, [*layers, Layer({"loop": {"seed": seed}}, "seeds")])
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith(str(file.path)) else f"{where}: {text}") from error

    if not pairs:
        resolved(0, 0)
        return []
    for section, keys in sections.items():
        if "loop.seed" in flatten(keys):
            raise UserError(f"{file.path}: {section}: loop.seed: is set by `seeds`. Remove it.")
    first = resolved(*pairs[0])
    placeholders: dict[str, Any] = {}
    for keys in sections.values():
        flat = flatten(keys)
        placeholders = {key: value for key, value in placeholders.items() if key not in flat}
        placeholders |= {key: value for key, value in flat.items() if has_placeholder(value)}
    values = flatten(as_plain(first))
    placeholders = {key: value for key, value in placeholders.items() if key in values}
    if any(not is_text(values[key]) or key.endswith(".name") for key in placeholders):
        return [first, *(resolved(seed, split) for seed, split in pairs[1:])]
    configs = [first]
    for seed, split in pairs[1:]:
        changed = substitute(where, placeholders, split=split, seed=seed)
        configs.append(_replace(first, {**changed, "loop.seed": seed}))
    return configs


def expand_runs(
    file: SweepFile,
    dataset: str,
    row: str,
    pairs: Sequence[tuple[int, int]],
    configs: Sequence[SegmentConfig],
    chains: Mapping[tuple[str, str, int], tuple[str, ...]],
) -> Iterator[SweepRun]:
    """Yield the runs of one row on one data set, with their folders and the steps that they need.

    Args:
        pairs: seed and split of each run.
        configs: of the same runs (`resolve_runs`).
        chains: names of the steps of each data set, entry of `prepare` and seed.
    """
    parent = file.out / slug(dataset) / slug(row)
    existing = _existing_folders(parent)
    entries = file.rows[row].needs
    entries = file.datasets[dataset].needs if entries is None else entries
    resources = file.resources | file.datasets[dataset].resources | file.rows[row].resources
    for (seed, split), config in zip(pairs, configs, strict=True):
        folder = _find_folder(parent, existing.get(seed, ()), seed, config)
        needs = dict.fromkeys(name for entry in entries for name in chains.get((dataset, entry, seed), ()))
        config = replace(config, out=str(folder))
        yield SweepRun(row, dataset, split, seed, file.preset, config, folder, tuple(needs), resources)


def _existing_folders(parent: Path) -> dict[int, list[Path]]:
    """Return the run folders in `parent` by seed."""
    folders: dict[int, list[Path]] = {}
    for folder in sorted(parent.glob("seed_*-*")):
        if match := re.match(r"seed_(\d+)-", folder.name):
            folders.setdefault(int(match[1]), []).append(folder)
    return folders


def _find_folder(parent: Path, existing: Iterable[Path], seed: int, config: SegmentConfig) -> Path:
    """Return the folder whose name has the digest of the run's identity, or else an existing one of the same identity.

    Another version may have named it, or its data was moved since.
    """
    folder = parent / f"seed_{seed}-{digest(identity(config))}"
    others = [other for other in existing if other != folder and any((other / name).exists() for name in STARTED)]
    if not folder.is_dir():
        return next((other for other in others if is_same_run(other, config)), folder)
    return folder


def is_same_run(folder: Path, config: SegmentConfig) -> bool:
    """Return whether the run in `folder` has the identity of `config`; not if its config can't be read."""
    try:
        return (folder / "config.yaml").is_file() and not differences(folder, config)
    except UserError:
        return False


def as_arguments(keys: Mapping[str, Any]) -> list[str]:
    """Return dotted keys and values as command-line options, `--key=value`."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]


def _replace(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a config with other values of some dotted keys."""
    own = {key: value for key, value in values.items() if "." not in key}
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, dot, rest = key.partition(".")
        if dot:
            sections.setdefault(section, {})[rest] = value
    own |= {section: _replace(getattr(config, section), keys) for section, keys in sections.items()}
    return replace(config, **{key: tuple(value) if isinstance(value, list) else value for key, value in own.items()})


def changes(preset: str, config: SegmentConfig) -> dict[str, Any]:
    """Return the keys that turn a preset into `config`, on a command line with it: names of components first."""
    plain = flatten(as_plain(config))
    names = tuple((key, value) for key, value in plain.items() if key.endswith(".name"))
    base = _with_names(preset, names)
    of_preset = _with_names(preset, ())
    changed = {key: value for key, value in names if of_preset.get(key, value) != value}
    return changed | {key: value for key, value in plain.items() if base.get(key, ...) != value}


@cache
def _with_names(preset: str, names: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Return the keys of a preset with components of these names; they need not fit each other."""
    settings = settings_of(SegmentConfig, [*_preset(preset), Layer(dict(names))])
    values = {key: option.default for key, option in settings.options.items()}
    values |= {key: setting.value for key, setting in settings.given.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@cache
def _preset(name: str) -> tuple[Layer, ...]:
    return tuple(read_preset(PRESETS, find_preset(PRESETS, name)))
