"""Split files: which records of a dataset are for training (labeled or unlabeled) and which for validation.

`make_split` is stratified by class and does not depend on the platform or on library versions: records and groups are
ordered by the sha256 of seed and name. In a grouped split no group (near-duplicates, or a patient's images) has records
in both training and validation. Shipped splits are in configs/splits/.
"""

import hashlib
import math
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
SUBSETS = ("labeled", "unlabeled", "validation")
REMEDY = "Create one with `mgcc shards split`."


@dataclass(frozen=True)
class Split:
    """Sorted keys of each subset; `labeled` and `unlabeled` are the training data."""

    name: str
    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    validation: tuple[str, ...]

    @property
    def train(self) -> tuple[str, ...]:
        """All training keys: the labeled ones, then the unlabeled ones."""
        return self.labeled + self.unlabeled


def make_split(
    records: Sequence[RecordInfo], seed: int, validation: int, labeled: int, grouped: bool, name: str
) -> Split:
    """Split `records` into `validation` for validation and the rest for training, `labeled` of them with masks.

    Each class gets its share of each subset to within one record. With `grouped` only complete groups go to validation:
    first those that fit the quotas of their classes, then any that fit the total. If none fits, validation stays
    smaller than requested, and a class may be off by what its groups require. Records without a mask are for training,
    unlabeled; those whose group is in validation are in no subset.

    If no record has a mask, validation is drawn from all records and `labeled` must be 0. Such a split is for a
    generative model, which needs no masks.

    Raises:
        UserError: there are fewer records with masks than requested, or no group fits.
    """
    group_of = {record.key: record.group if grouped else record.key for record in records}
    masks = any(record.labeled for record in records)
    without_mask = [record for record in records if masks and not record.labeled]
    records = sorted((record for record in records if record.labeled or not masks), key=lambda record: record.key)
    most_labeled = len(records) - validation if masks else 0
    if not 0 < validation < len(records) or not min(1, most_labeled) <= labeled <= most_labeled:
        raise UserError(
            f"{name}: cannot take {validation} validation and {labeled} labeled training records from {len(records)}"
            + (f" with masks ({len(without_mask)} have none)" if without_mask else "")
        )
    groups: dict[str, list[RecordInfo]] = {}
    for record in records:
        groups.setdefault(group_of[record.key], []).append(record)

    validation_groups = _choose_groups(groups, records, validation, seed)
    if not validation_groups:
        smallest = min(map(len, groups.values()))
        raise UserError(
            f"{name}: no group fits into {validation} validation records. There are {len(groups)} groups, the smallest "
            f"with {smallest} of {len(records)} records. "
            + (
                f"Use --validation {math.ceil(1000 * smallest / len(records)) / 1000:g} or more, or split without "
                "--grouped."
                if len(groups) > 1
                else "Split without --grouped, or convert with other groups."
            )
        )
    train = {record.key: record.category for record in records if group_of[record.key] not in validation_groups}
    quota = _quotas(Counter(train.values()), labeled)
    with_mask = set()
    for key in _shuffle(train, f"{seed}/labeled"):
        if quota[train[key]] > 0:
            with_mask.add(key)
            quota[train[key]] -= 1
    return Split(
        name,
        labeled=tuple(key for key in train if key in with_mask),
        unlabeled=tuple(
            sorted(
                [key for key in train if key not in with_mask]
                + [record.key for record in without_mask if group_of[record.key] not in validation_groups]
            )
        ),
        validation=tuple(record.key for record in records if record.key not in train),
    )


def leaks(split: Split, records: Iterable[RecordInfo]) -> list[str]:
    """Return the validation keys whose group also has training records."""
    group_of = {record.key: record.group for record in records}
    train_groups = {group_of[key] for key in split.train}
    return [key for key in split.validation if group_of[key] in train_groups]


def write_split(path: Path, split: Split, **notes: Any) -> None:
    """Write a split file; `notes` document how it was made."""
    subsets = {subset: list(getattr(split, subset)) for subset in SUBSETS}
    sizes = {subset: len(keys) for subset, keys in subsets.items()}
    write_json(path, {"format": FORMAT, "version": VERSION, "name": split.name, **notes, "sizes": sizes, **subsets})


def locate_split(name: str) -> Path:
    """Return the split file at that path, or the shipped one of that name in configs/splits/, such as busi_random_1.

    Raises:
        UserError: there is neither.
    """
    shipped = {path.stem: path for path in sorted((CONFIGS / "splits").glob("*.json"))}
    if name in shipped:
        return shipped[name]
    if not Path(name).is_file():
        hint = did_you_mean(name, shipped) or f" Shipped splits: {', '.join(shipped)}. {REMEDY}"
        raise UserError(f"{name}: no split file and no shipped split of that name.{hint}")
    return Path(name)


def read_split(path: Path) -> Split:
    """Read a split file.

    Raises:
        UserError: the file does not exist or is not a split file, a subset is missing, or a key is listed twice.
    """
    if not path.is_file():
        raise UserError(f"{path}: does not exist. {REMEDY}")
    content = read_versioned(path, FORMAT, VERSION, REMEDY)
    for subset in SUBSETS:
        keys = content.get(subset)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise UserError(f"{path}: {subset!r} must be a list of keys")
    for key, times in Counter(key for subset in SUBSETS for key in content[subset]).items():
        if times > 1:
            listed = " and ".join(subset for subset in SUBSETS for other in content[subset] if other == key)
            raise UserError(f"{path}: {key!r} is in {listed}. List each record once.")
    return Split(str(content.get("name", path.stem)), *(tuple(content[subset]) for subset in SUBSETS))


def _choose_groups(
    groups: Mapping[str, list[RecordInfo]], records: Sequence[RecordInfo], total: int, seed: int
) -> set[str]:
    """Choose groups with at most `total` records, as close as possible to the class proportions of `records`."""
    chosen: set[str] = set()
    quota = Counter(_quotas(Counter(record.category for record in records), total))
    order = _shuffle(groups, f"{seed}/validation")
    for group in order:
        classes = Counter(record.category for record in groups[group])
        if classes <= quota:
            chosen.add(group)
            quota -= classes
    missing = quota.total()
    for group in order:
        if group not in chosen and len(groups[group]) <= missing:
            chosen.add(group)
            missing -= len(groups[group])
    return chosen


def _quotas(counts: Mapping[str, int], total: int) -> dict[str, int]:
    """Divide `total` in proportion to `counts`, to within one of exact (largest remainders)."""
    exact = {name: total * count / sum(counts.values()) for name, count in counts.items()}
    quotas = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (quotas[name] - exact[name], name))
    for name in by_remainder[: total - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _shuffle(names: Iterable[str], salt: str) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}/{name}".encode()).digest())
