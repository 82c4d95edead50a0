"""A sweep file expands to runs: the rows of a table x data sets x seeds.

    python -m mgcc_dist.sweeps configs/sweeps/table_1.yaml --datasets BUSI | sh

prints one command a run, for `sh` (one after the other) or for several at a time:

    ... | xargs -P 2 -d '\\n' -I{} sh -c '{}'

The same line again goes on where it was stopped. `mgcc_dist.report --sweep` reads the same file and puts the finished
runs into the table.

A sweep file holds:

    title: what the table compares
    paper: table_I              # the table of configs/paper/tables.yaml that it stands beside; null if none
    out: out/sweeps/table_1     # run folders: OUT/DATASET/ROW/seed_K
    preset: mgcc_busi           # the config of `segment` that the keys below change
    reference: MGCC             # the row that the others are compared with; null if none
    seeds: [1, 2, 3]            # training seeds; an empty list makes no run and needs no data sets
    splits: [1, 2, 3]           # the split of each; seed k on split k, as the paper's three runs, where left out
    defaults: {loop: {...}}     # keys of `segment` for all runs
    datasets:                   # keys of `segment` for each data set; {split} and {seed} are filled in
      BUSI: {paper: BUSI, data: {shards: out/busi, split: "busi_random_{split}"}}
    rows:                       # keys of `segment` for each row; they win over the data set's, which win over defaults
      U-Net: {method: {name: supervised}, network: {name: unet}}
    notes: what the table is and is not
"""

import copy
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from mgcc_dist.config import CONFIGS
from mgcc_dist.errors import UserError, run_program

KEYS = {"title", "paper", "out", "preset", "reference", "seeds", "splits", "defaults", "datasets", "rows", "notes"}
REQUIRED = ("title", "out", "preset", "seeds", "rows")
SECTIONS = ("data", "loop", "method", "network")


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
    """run folder"""

    def command(self) -> list[str]:
        """The words after `python` (or `accelerate launch`) that carry this run out."""
        keys = {**flat(self.config), "out": str(self.folder)}
        return ["-m", "mgcc_dist.segment", "--preset", self.preset, *(f"--{k}={_word(v)}" for k, v in keys.items())]


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

    layers = [("defaults", content.get("defaults") or {})]
    layers += [(f"datasets.{name}", {k: v for k, v in keys.items() if k != "paper"}) for name, keys in datasets.items()]
    layers += [(f"rows.{name}", keys) for name, keys in rows.items()]
    for place, layer in layers:
        _check_keys(path, place, layer)
    by_place = dict(layers)

    out = Path(content["out"])
    runs = []
    for seed, split in zip(seeds, splits, strict=True):
        for dataset in datasets:
            for row in rows:
                config: dict[str, Any] = {"loop": {"seed": seed}}
                for layer in (by_place["defaults"], by_place[f"datasets.{dataset}"], by_place[f"rows.{row}"]):
                    config = _merged(config, layer)
                config = _filled(path, config, split, seed)
                folder = out / slug(dataset) / slug(row) / f"seed_{seed}"
                runs.append(SweepRun(row, dataset, split, seed, content["preset"], config, folder))
    notes = str(content.get("notes") or "").strip()
    return Sweep(path.stem, content["title"], content.get("paper"), reference, out, rows, columns, runs, notes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="sweeps", description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("sweep", type=str, help="sweep file")
    parser.add_argument("--datasets", type=str, nargs="+", default=[], help="only these")
    parser.add_argument("--rows", type=str, nargs="+", default=[], help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="only these")
    try:
        chosen = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    except ArgumentError as error:
        raise UserError(" ".join(error.message.split())) from error
    sweep = read_sweep(Path(chosen.sweep))
    known: dict[str, list[Any]] = {
        "datasets": list(sweep.columns),
        "rows": list(sweep.rows),
        "seeds": sorted({run.seed for run in sweep.runs}),
    }
    for key, names in known.items():
        if unknown := [name for name in chosen[key] if name not in names]:
            raise UserError(f"{chosen.sweep} has no {key} {unknown[0]!r}; choose of {', '.join(map(str, names))}")
    for run in sweep.runs:
        is_of = {"datasets": run.dataset, "rows": run.row, "seeds": run.seed}
        if all(name in (chosen[key] or known[key]) for key, name in is_of.items()):
            print(shlex.join([sys.executable, *run.command()]))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    keys: dict[str, Any] = {}
    for key, value in tree.items():
        keys |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return keys


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


def _filled(path: Path, value: Any, split: int, seed: int) -> Any:
    """{split} and {seed} in all texts of a config."""
    if isinstance(value, dict):
        return {key: _filled(path, item, split, seed) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(path, item, split, seed) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return value.format(split=split, seed=seed)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path}: {value!r} may hold {{split}} and {{seed}} only ({error})") from error


def _word(value: Any) -> str:
    """A value as `segment` reads it from its command line."""
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    run_program("sweeps", main)
