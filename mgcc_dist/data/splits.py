"""Splits are files: which records of a data set are labeled training, unlabeled training and validation images.

`make_split` is stratified by class and independent of platform and library versions: records and groups are put in
the order of the sha256 of seed and name, and taken from the front. In a grouped split no group (near-duplicates, or a
patient's images) has records in both training and validation. Shipped splits are in configs/splits/.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError, did_you_mean
from mgcc_dist.common.files import read_versioned, write_json
from mgcc_dist.data.sample import RecordInfo

FORMAT = "mgcc-dist split"
VERSION = 1
PARTS = ("labeled", "unlabeled", "validation")


@dataclass(frozen=True)
class Split:
    """Keys by part, each sorted. Training is `labeled` and `unlabeled` together."""

    name: str
    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    validation: tuple[str, ...]


def make_split(
    records: Sequence[RecordInfo], seed: int, validation: int, labeled: int, grouped: bool, name: str
) -> Split:
    """Divide `records`: `validation` for validation, the others for training, `labeled` of these with their masks.

    Each class gets its share of each part to within one record. With `grouped` whole groups go to validation: those
    that fit the shares of their classes, then any that fit the total. Where none fits any more, validation stays
    smaller than asked; and a class may be off by what its groups demand.

    Raises:
        UserError: there are fewer records than asked for, or records without a mask.
    """
    if not 0 < validation < len(records) or not 0 < labeled <= len(records) - validation:
        raise UserError(
            f"{name}: cannot take {validation} validation and {labeled} labeled training records of {len(records)}"
        )
    if unmasked := [record.key for record in records if not record.labeled]:
        raise UserError(f"{name}: {len(unmasked)} records have no mask, {unmasked[0]!r} first; a split needs masks")
    records = sorted(records, key=lambda record: record.key)
    group_of = {record.key: record.group if grouped else record.key for record in records}
    groups: dict[str, list[RecordInfo]] = {}
    for record in records:
        groups.setdefault(group_of[record.key], []).append(record)

    room = Counter(_quotas(Counter(record.category for record in records), validation))
    held_out: set[str] = set()
    order = _shuffled(groups, f"{seed}/validation")
    for group in order:
        classes = Counter(record.category for record in groups[group])
        if classes <= room:
            held_out.add(group)
            room -= classes
    missing = room.total()
    for group in order:
        if group not in held_out and len(groups[group]) <= missing:
            held_out.add(group)
            missing -= len(groups[group])

    training = {record.key: record.category for record in records if group_of[record.key] not in held_out}
    room = Counter(_quotas(Counter(training.values()), labeled))
    with_mask = set()
    for key in _shuffled(training, f"{seed}/labeled"):
        if room[training[key]] > 0:
            with_mask.add(key)
            room[training[key]] -= 1
    return Split(
        name,
        labeled=tuple(key for key in training if key in with_mask),
        unlabeled=tuple(key for key in training if key not in with_mask),
        validation=tuple(record.key for record in records if record.key not in training),
    )


def leaks(split: Split, records: Iterable[RecordInfo]) -> list[str]:
    """The validation keys whose group has records in training too."""
    group_of = {record.key: record.group for record in records}
    training = {group_of[key] for key in (*split.labeled, *split.unlabeled)}
    return [key for key in split.validation if group_of[key] in training]


def write_split(path: Path, split: Split, **notes: Any) -> None:
    """Write a split file; `notes` say how it was made and are for people."""
    parts = {part: list(getattr(split, part)) for part in PARTS}
    sizes = {part: len(keys) for part, keys in parts.items()}
    write_json(path, {"format": FORMAT, "version": VERSION, "name": split.name, **notes, "sizes": sizes, **parts})


def locate_split(name: str) -> Path:
    """Return the split file at that path, or the shipped one of that name in configs/splits/, such as busi_random_1.

    Raises:
        UserError: there is neither.
    """
    shipped = {path.stem: path for path in sorted((CONFIGS / "splits").glob("*.json"))}
    if name in shipped:
        return shipped[name]
    if not Path(name).is_file():
        hint = did_you_mean(name, shipped) or f" Shipped splits: {', '.join(shipped)}. `mgcc shards split` writes one."
        raise UserError(f"{name}: no split file and no shipped split of that name.{hint}")
    return Path(name)


def read_split(path: Path) -> Split:
    """Read a split file.

    Raises:
        UserError: not there, not a split file, a part missing, or a key in two places.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there; write it with `python -m mgcc_dist.shards split`")
    content = read_versioned(path, FORMAT, VERSION, "Write one with `mgcc shards split`.")
    for part in PARTS:
        keys = content.get(part)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise UserError(f"{path}: {part!r} must be a list of keys")
    for key, times in Counter(key for part in PARTS for key in content[part]).items():
        if times > 1:
            places = " and ".join(part for part in PARTS for other in content[part] if other == key)
            raise UserError(f"{path}: {key!r} is in {places}; each record belongs in one place")
    return Split(str(content.get("name", path.stem)), *(tuple(content[part]) for part in PARTS))


def _quotas(counts: Mapping[str, int], total: int) -> dict[str, int]:
    """Shares of `total` proportional to `counts` and within one of exact (largest remainders)."""
    exact = {name: total * count / sum(counts.values()) for name, count in counts.items()}
    quotas = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (quotas[name] - exact[name], name))
    for name in by_remainder[: total - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _shuffled(names: Iterable[str], salt: str) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}/{name}".encode()).digest())
