"""Sweep files: the rows of a results table x data sets x seeds, and the steps that prepare their data.

A sweep file holds:

    base: table_1               # a sweep that this one changes: a shipped one, or a file next to this one
    title: what the table compares
    paper: table_I              # table of configs/paper/tables.yaml to compare with; null for none
    out: out/sweeps/table_1     # run folders: OUT/DATASET/ROW/seed_K-HASH; the hash is of the run's identity
    import: my_method.py        # module or file, or a list of them, that registers components of your own
    preset: mgcc_busi           # the config of `segment` that the keys below override: a shipped one, or a file
    reference: MGCC             # the row that the others are tested against; null for none
    seeds: [1, 2, 3]            # training seeds; an empty list means no runs, and then no data sets are needed
    splits: [1, 2, 3]           # one split per seed; default: the seed's number, as in the paper's three runs
    resources: {...}            # cluster resources per run (docs/how-to/cluster.md); also allowed per row and data set
    defaults: {loop: {...}}     # keys of `segment` for all runs
    datasets:                   # keys of `segment` per data set; {split} and {seed} are substituted
      BUSI: {paper: BUSI, data: {shards: out/busi, split: "busi_random_{split}"}, prepare: {...}}
    rows:                       # keys of `segment` per row; they override the data set's, which override defaults
      U-Net: {method: {name: supervised}, network: {name: unet}}
    search: {...}               # a search around one row (search.py)
    notes: scope and limitations of the table

With `base`, mappings are merged key by key, other values are replaced, and a row or data set that is null is dropped.

`prepare` lists the programs that create a data set's inputs. An entry that names several stages runs once per stage,
with {stage} substituted. `needs` names the entries that must finish before an entry starts; if no entry has `needs`,
each waits for the one before. A data set's runs start after the entries that its `needs` names (default: all); a row
may have its own `needs`.

    prepare:
      shards: {run: shards busi --root DIR --out out/busi, makes: out/busi/index.json}
      ldm:
        needs: [shards]
        run: ldm --data.shards out/busi --out out/ldm/busi_{split} --until {stage}
        makes:
          autoencoder: out/ldm/busi_{split}/autoencoder/result.json
          denoiser: out/ldm/busi_{split}/denoiser/result.json
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from mgcc_dist.common.config import CONFIGS, read_yaml
from mgcc_dist.common.errors import UserError, did_you_mean

PAPER_TABLES = CONFIGS / "paper" / "tables.yaml"
REQUIRED_KEYS = ("title", "out", "preset", "seeds", "rows")
SWEEP_KEYS = (
    *("base", "import", "title", "paper", "out", "preset", "reference", "seeds", "splits"),
    *("resources", "defaults", "datasets", "rows", "search", "notes"),
)
SEGMENT_SECTIONS = ("data", "loop", "method", "network")
STEP_KEYS = ("run", "makes", "needs", "resources")
SHIPPED = CONFIGS / "sweeps"


@dataclass(frozen=True)
class Preparation:
    """An entry of `prepare`."""

    run: str
    """a command line without `mgcc`, with placeholders"""
    makes: dict[str, str]
    """by stage, the file that marks it as done; the stage of an entry without stages is "" """
    needs: tuple[str, ...]
    """other entries"""
    resources: dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    column: str
    """column of the paper's table"""
    keys: dict[str, Any]
    """keys of `segment`, nested"""
    prepare: dict[str, Preparation]
    """each after those that it needs"""
    needs: tuple[str, ...]
    """entries of `prepare` that its runs need"""
    resources: dict[str, Any]


@dataclass(frozen=True)
class Row:
    keys: dict[str, Any]
    """keys of `segment`, nested"""
    needs: tuple[str, ...] | None
    """entries of `prepare` that its runs need; None: those of the data set"""
    resources: dict[str, Any]


@dataclass(frozen=True)
class SweepFile:
    """A sweep file as it is written, its `base` included."""

    path: Path
    imports: tuple[str, ...]
    """modules and files that register components"""
    title: str
    paper: str | None
    out: Path
    preset: str
    reference: str | None
    seeds: tuple[int, ...]
    splits: tuple[int, ...]
    """one per seed"""
    resources: dict[str, Any]
    defaults: dict[str, Any]
    datasets: dict[str, Dataset]
    rows: dict[str, Row]
    search: dict[str, Any] | None
    """read by search.py"""
    notes: str


def find_sweep(name: str | Path) -> Path:
    """Return the sweep file at that path, or the shipped one of that name.

    Raises:
        UserError: there is neither.
    """
    path, shipped = Path(name), SHIPPED / f"{name}.yaml"
    if path.is_file():
        return path
    if len(path.parts) == 1 and shipped.is_file():
        return shipped
    names = [file.stem for file in sorted(SHIPPED.glob("*.yaml"))]
    hint = did_you_mean(path.stem, names) or f" Shipped sweeps: {', '.join(names)}."
    raise UserError(f"{name}: file not found, and no shipped sweep has that name.{hint}")


def read_file(path: Path) -> SweepFile:
    """Read a sweep file with its `base`. Does not check the keys of `segment` and of the steps' programs.

    Raises:
        UserError: the file is not YAML, or a key is missing, unknown or has a value of the wrong type; the message
            names the file and the key.
    """
    content = _read_with_base(path)
    if unknown := sorted(map(str, content.keys() - set(SWEEP_KEYS))):
        raise UserError(f"{path}: unknown key {unknown[0]!r}. Known keys: {', '.join(SWEEP_KEYS)}.")
    if missing := [key for key in REQUIRED_KEYS if content.get(key) is None]:
        raise UserError(f"{path}: key {missing[0]!r} is missing")
    for key in ("title", "out", "preset"):
        if not isinstance(content[key], str):
            raise UserError(f"{path}: {key} must be a string, got {content[key]!r}")
    seeds, splits = _read_seeds(path, content)
    datasets = _named(path, "datasets", content.get("datasets") or {}) if seeds or content.get("datasets") else {}
    rows = _named(path, "rows", content["rows"])
    reference = content.get("reference")
    if reference is not None and reference not in rows:
        raise UserError(f"{path}: reference {reference!r} is not a row. Choose one of: {', '.join(rows)}.")
    paper, tables = content.get("paper"), read_yaml(PAPER_TABLES.read_text(encoding="utf-8"), str(PAPER_TABLES))
    if paper is not None and paper not in tables:
        raise UserError(
            f"{path}: paper {paper!r} is not one of the paper's tables. Choose one of: {', '.join(tables)}."
        )
    search = content.get("search")
    if search is not None and not isinstance(search, dict):
        raise UserError(f"{path}: search must be a mapping, got {search!r}")
    read_datasets = {name: _read_dataset(path, name, keys) for name, keys in datasets.items()}
    entries = {entry for dataset in read_datasets.values() for entry in dataset.prepare}
    read_rows = {name: _read_row(path, name, keys, entries) for name, keys in rows.items()}
    imports = content.get("import") or []
    imports = [imports] if isinstance(imports, str) else imports
    if not isinstance(imports, list) or not all(isinstance(each, str) for each in imports):
        raise UserError(f"{path}: import must be a module or a file, or a list of them, got {imports!r}")
    return SweepFile(
        path=path,
        imports=tuple(imports),
        title=content["title"],
        paper=paper,
        out=Path(content["out"]),
        preset=content["preset"],
        reference=reference,
        seeds=seeds,
        splits=splits,
        resources=_resources(path, "", content),
        defaults=_segment_keys(path, "defaults", content.get("defaults") or {}, ()),
        datasets=read_datasets,
        rows=read_rows,
        search=search,
        notes=str(content.get("notes") or "").strip(),
    )


def slug(name: str) -> str:
    """Return a name as a folder name: lower case, with hyphens for everything but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _read_with_base(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a sweep file and merge it into its base.

    Args:
        derived: the files that lead to this one by their `base`.
    """
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML ({error})") from error
    if not content:
        raise UserError(f"{path}: not a sweep file. See `mgcc sweep --help` for the format.")
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the name or the path of a sweep, got {base!r}")
    nearby = path.parent / base
    try:
        found = nearby if nearby.is_file() else find_sweep(base)
    except UserError as error:
        raise UserError(f"{path}: base: {error}") from error
    if found.resolve() in (file.resolve() for file in (*derived, path)):
        raise UserError(f"{path}: base: {found} has this file as its own base")
    merged = merge(_read_with_base(found, (*derived, path)), content)
    for key in ("datasets", "rows"):
        if isinstance(merged.get(key), dict):
            merged[key] = {name: keys for name, keys in merged[key].items() if keys is not None}
    return merged


def merge(base: Mapping[Any, Any], changes: Mapping[Any, Any]) -> dict[Any, Any]:
    """Merge two mappings key by key; other values of `changes` replace those of `base`."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def _read_seeds(path: Path, content: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the seeds, and the split of each."""
    seeds, splits = content["seeds"], content.get("splits", content["seeds"])
    for key, numbers in (("seeds", seeds), ("splits", splits)):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise UserError(f"{path}: {key} must be a list of integers like [1, 2, 3], got {numbers}")
    if len(splits) != len(seeds):
        raise UserError(f"{path}: got {len(splits)} splits for {len(seeds)} seeds. Give one split per seed.")
    if repeated := [seed for seed, count in Counter(seeds).items() if count > 1]:
        raise UserError(f"{path}: seed {repeated[0]} appears more than once")
    return tuple(seeds), tuple(splits)


def _named(path: Path, key: str, named: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(named, dict) or not named or not all(isinstance(keys, dict) for keys in named.values()):
        raise UserError(f"{path}: {key} must be a mapping from names to keys of `segment`")
    for folder, count in Counter(slug(str(name)) for name in named).items():
        if count > 1 or not folder:
            names = " and ".join(repr(name) for name in named if slug(str(name)) == folder)
            raise UserError(f"{path}: {key} {names} would use the folder name {folder!r}. Rename one.")
    return named


def _read_dataset(path: Path, name: str, keys: dict[str, Any]) -> Dataset:
    section = f"datasets.{name}"
    prepare = keys.get("prepare") or {}
    if not isinstance(prepare, dict):
        raise UserError(f"{path}: {section}.prepare must be a mapping from names to steps")
    entries = list(prepare)
    has_needs = any(isinstance(step, dict) and "needs" in step for step in prepare.values())
    read: dict[str, Preparation] = {}
    for index, (entry, step) in enumerate(prepare.items()):
        before = [] if has_needs else entries[max(0, index - 1) : index]
        read[entry] = _read_step(path, f"{section}.prepare.{entry}", step, entries, before)
    try:
        ordered = list(TopologicalSorter({entry: step.needs for entry, step in read.items()}).static_order())
    except CycleError as error:
        raise UserError(f"{path}: {section}.prepare: {' needs '.join(reversed(error.args[1]))}") from error
    return Dataset(
        column=str(keys.get("paper", name)),
        keys=_segment_keys(path, section, keys, ("paper", "prepare", "needs", "resources")),
        prepare={entry: read[entry] for entry in ordered},
        needs=_needs(path, section, keys, entries, default=entries),
        resources=_resources(path, section, keys),
    )


def _read_row(path: Path, name: str, keys: dict[str, Any], entries: set[str]) -> Row:
    section = f"rows.{name}"
    return Row(
        keys=_segment_keys(path, section, keys, ("needs", "resources")),
        needs=_needs(path, section, keys, sorted(entries), default=[]) if "needs" in keys else None,
        resources=_resources(path, section, keys),
    )


def _read_step(path: Path, section: str, step: Any, entries: list[str], before: list[str]) -> Preparation:
    if not isinstance(step, dict) or not isinstance(step.get("run"), str) or not step.get("makes"):
        raise UserError(f"{path}: {section} needs `run`, a command, and `makes`, the file that it writes last")
    if unknown := sorted(step.keys() - set(STEP_KEYS)):
        raise UserError(f"{path}: {section}: unknown key {unknown[0]!r}. Known keys: {', '.join(STEP_KEYS)}.")
    makes = step["makes"] if isinstance(step["makes"], dict) else {"": step["makes"]}
    return Preparation(
        step["run"],
        {str(stage): str(output) for stage, output in makes.items()},
        _needs(path, section, step, entries, default=before),
        _resources(path, section, step),
    )


def _needs(path: Path, section: str, keys: dict[str, Any], known: list[str], default: list[str]) -> tuple[str, ...]:
    needs = keys.get("needs")
    if needs is None:
        return tuple(default)
    if not isinstance(needs, list):
        raise UserError(f"{path}: {section}.needs must be a list of entries of `prepare`, got {needs!r}")
    if unknown := [name for name in needs if name not in known]:
        raise UserError(
            f"{path}: {section}.needs: {unknown[0]!r} is not an entry of `prepare`. "
            f"Choose from: {', '.join(known) or 'none'}."
        )
    return tuple(needs)


def _segment_keys(path: Path, section: str, layer: Any, others: Sequence[str]) -> dict[str, Any]:
    """Return the keys of `segment` in a section, which holds `others` too. Only the outermost level is checked."""
    if not isinstance(layer, dict):
        raise UserError(f"{path}: {section} must hold keys of `segment`, got {layer!r}")
    keys = {name: value for name, value in layer.items() if name not in others}
    for name in keys:
        if name not in SEGMENT_SECTIONS:
            known = ", ".join([*SEGMENT_SECTIONS, *others])
            raise UserError(f"{path}: {section}.{name} is not one of the sections {known}")
    return keys


def _resources(path: Path, section: str, layer: dict[str, Any]) -> dict[str, Any]:
    resources = layer.get("resources") or {}
    if not isinstance(resources, dict):
        raise UserError(f"{path}: {section}{'.' if section else ''}resources must be a mapping, got {resources!r}")
    return resources
