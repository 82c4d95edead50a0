"""Split files: which records of a dataset are for training (labeled or unlabeled), for validation and for the test.

The best step is chosen on the validation records; test records, which a split need not have, are scored once. Splits
are stratified by class and do not depend on the platform or on library versions: records and groups are ordered by the
sha256 of seed and name. In a grouped split no group (near-duplicates, or a patient's images) has records in two of
training, validation and test. Shipped splits are in configs/splits/.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError, did_you_mean
from mgcc_dist.common.files import read_versioned, write_json
from mgcc_dist.data.sample import RecordInfo

FORMAT = "mgcc-dist split"
VERSION = 1
SUBSETS = ("labeled", "unlabeled", "validation", "test")
TEST = "test"
"""the subset that a split need not have; also the published fold of images that are for testing only"""
REMEDY = "Create one with `mgcc shards split`."


@dataclass(frozen=True)
class Split:
    """Sorted keys of each subset; `labeled` and `unlabeled` are the training data."""

    name: str
    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...] = ()

    @property
    def train(self) -> tuple[str, ...]:
        """All training keys: the labeled ones, then the unlabeled ones."""
        return self.labeled + self.unlabeled


def make_split(
    records: Sequence[RecordInfo],
    seed: int,
    validation: int | Collection[str],
    labeled: int,
    grouped: bool,
    name: str,
    test: Collection[str] = (),
) -> Split:
    """Split `records` into `validation` for validation and the rest for training, `labeled` of them with masks.

    Each class gets its share of each subset to within one record. With `grouped` only complete groups go to validation:
    first those that fit the quotas of their classes, then any that fit the total. If none fits, validation stays
    smaller than requested, and a class may be off by what its groups require. Records without a mask are for training,
    unlabeled; those whose group is in validation or test are in no subset. Of one seed, a half, a quarter, ... of
    labeled records are nested in each other.

    If no record has a mask, validation is drawn from all records and `labeled` must be 0. Such a split is for a
    generative model, which needs no masks.

    Args:
        validation: how many records to draw, or the keys of given ones.
        test: keys of the test records (`choose_test`, `make_folds`), which are for nothing else.

    Raises:
        UserError: there are fewer records with masks than requested, or no group fits.
    """
    group_of = _groups(records, grouped)
    test_groups = {group_of[key] for key in test}
    records = [record for record in records if group_of[record.key] not in test_groups]
    masks = any(record.labeled for record in records)
    without_mask = [record for record in records if masks and not record.labeled]
    records = sorted((record for record in records if record.labeled or not masks), key=lambda record: record.key)
    count = validation if isinstance(validation, int) else len(validation)
    most_labeled = len(records) - count if masks else 0
    if not 0 < count < len(records) or not min(1, most_labeled) <= labeled <= most_labeled:
        raise UserError(
            f"{name}: cannot take {count} validation and {labeled} labeled training records from {len(records)}"
            + (f" with masks ({len(without_mask)} have none)" if without_mask else "")
        )
    if isinstance(validation, int):
        validation_groups = _choose_groups(records, group_of, validation, f"{seed}/validation", f"{name}: no group")
    else:
        validation_groups = {group_of[key] for key in validation}
    train = {record.key: record.category for record in records if group_of[record.key] not in validation_groups}
    with_mask = set(_choose_labeled(train, labeled, most_labeled, seed))
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
        test=tuple(sorted(test)),
    )


def choose_test(records: Sequence[RecordInfo], seed: int, count: int, grouped: bool, name: str) -> tuple[str, ...]:
    """Choose `count` of the records with a mask for the test, by the rules of `make_split`; return their keys.

    Raises:
        UserError: no group fits.
    """
    records = [record for record in records if record.labeled]
    group_of = _groups(records, grouped)
    chosen = _choose_groups(records, group_of, count, f"{seed}/test", f"{name}: test: no group")
    return tuple(sorted(key for key, group in group_of.items() if group in chosen))


def make_folds(records: Sequence[RecordInfo], seed: int, folds: int, grouped: bool, name: str) -> list[tuple[str, ...]]:
    """Divide the records with a mask into `folds` test parts of similar size and class proportions; return their keys.

    Groups, the largest first, go to the fold that has the smallest share of their classes.

    Raises:
        UserError: there are fewer groups than folds.
    """
    records = [record for record in records if record.labeled]
    group_of = _groups(records, grouped)
    members = _members(records, group_of)
    if not 1 < folds <= len(members):
        kind = "groups" if grouped else "records"
        raise UserError(f"{name}: cannot make {folds} folds of {len(members)} {kind} with masks")
    total = Counter(record.category for record in records)
    counts = [Counter[str]() for _ in range(folds)]
    fold_of: dict[str, int] = {}
    for group in sorted(_shuffle(members, f"{seed}/folds"), key=lambda group: -len(members[group])):
        classes = Counter(record.category for record in members[group])

        def fullness(fold: int, classes: Counter[str] = classes) -> tuple[float, int]:
            shares = (number * counts[fold][each] / total[each] ** 2 for each, number in sorted(classes.items()))
            return sum(shares), counts[fold].total()

        fold_of[group] = min(range(folds), key=fullness)
        counts[fold_of[group]] += classes
    return [tuple(sorted(key for key, group in group_of.items() if fold_of[group] == fold)) for fold in range(folds)]


def published_folds(records: Sequence[RecordInfo], name: str) -> dict[str, tuple[list[str], list[str]]]:
    """Return the test keys and validation keys of each fold that the data set's authors published, by its name.

    If some images are for testing only, they are the test records of every fold, and the fold is its validation part.
    Else the fold is the test part, and there are no validation keys.

    Raises:
        UserError: the records have no folds.
    """
    members: dict[str, list[str]] = {}
    for record in records:
        members.setdefault(record.fold, []).append(record.key)
    test = members.pop(TEST, [])
    members.pop("", None)
    if not members:
        raise UserError(
            f"{name}: has no published folds. Convert BUS-BRA with its 5-fold-cv.csv, or TN3K with its "
            "tn3k-trainval-fold0.json, ..., or use --folds."
        )
    return {fold: (test, keys) if test else (keys, []) for fold, keys in sorted(members.items())}


def leaks(split: Split, records: Iterable[RecordInfo], subset: str = "validation") -> list[str]:
    """Return the keys of a subset whose group also has training records or, for the test, validation records."""
    group_of = {record.key: record.group for record in records}
    seen = {group_of[key] for key in (split.train if subset == "validation" else split.train + split.validation)}
    return [key for key in getattr(split, subset) if group_of[key] in seen]


def write_split(path: Path, split: Split, **notes: Any) -> None:
    """Write a split file; `notes` document how it was made."""
    subsets = {subset: list(getattr(split, subset)) for subset in SUBSETS if subset != TEST or split.test}
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
        keys = content.setdefault(subset, [] if subset == TEST else None)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise UserError(f"{path}: {subset!r} must be a list of keys")
    for key, times in Counter(key for subset in SUBSETS for key in content[subset]).items():
        if times > 1:
            listed = " and ".join(subset for subset in SUBSETS for other in content[subset] if other == key)
            raise UserError(f"{path}: {key!r} is in {listed}. List each record once.")
    return Split(str(content.get("name", path.stem)), *(tuple(content[subset]) for subset in SUBSETS))


def _groups(records: Iterable[RecordInfo], grouped: bool) -> dict[str, str]:
    return {record.key: record.group if grouped else record.key for record in records}


def _members(records: Iterable[RecordInfo], group_of: Mapping[str, str]) -> dict[str, list[RecordInfo]]:
    members: dict[str, list[RecordInfo]] = {}
    for record in sorted(records, key=lambda record: record.key):
        members.setdefault(group_of[record.key], []).append(record)
    return members


def _choose_groups(
    records: Sequence[RecordInfo], group_of: Mapping[str, str], total: int, salt: str, no_group: str
) -> set[str]:
    """Choose groups with at most `total` records, as close as possible to the class proportions of `records`.

    Raises:
        UserError: no group has so few records; the message begins with `no_group`.
    """
    groups = _members(records, group_of)
    chosen: set[str] = set()
    quota = Counter(_quotas(Counter(record.category for record in records), total))
    order = _shuffle(groups, salt)
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
    if not chosen:
        smallest = min(map(len, groups.values()), default=0)
        part = salt.rpartition("/")[2]
        raise UserError(
            f"{no_group} fits into {total} {part} records. There are {len(groups)} groups, the smallest "
            f"with {smallest} of {len(records)} records. "
            + (
                f"Use --{part} {math.ceil(1000 * smallest / len(records)) / 1000:g} or more, or split without "
                "--grouped."
                if len(groups) > 1
                else "Split without --grouped, or convert with other groups."
            )
        )
    return chosen


def _choose_labeled(category: Mapping[str, str], count: int, most: int, seed: int) -> list[str]:
    """Choose `count` of the keys, each class in proportion: of `most` of them a half, of that a half, and so on."""
    chosen = _shuffle(category, f"{seed}/labeled")
    sizes = [round(most / 2**halvings) for halvings in range(most.bit_length() + 1)]
    for size in [*(size for size in sizes if size >= count), count]:
        quota = _quotas(Counter(category[key] for key in chosen), size)
        taken = []
        for key in chosen:
            if quota[category[key]] > 0:
                taken.append(key)
                quota[category[key]] -= 1
        chosen = taken
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
