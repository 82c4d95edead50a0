"""From a reader to a shard folder: resized, grouped, in shards, index.json last."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import write_json
from mgcc_dist.common.progress import track
from mgcc_dist.data.images import BadFile, resize_image, resize_mask
from mgcc_dist.data.readers.reader import Reader
from mgcc_dist.data.records import INDEX, ShardFolder, read_index, write_index, write_shard
from mgcc_dist.data.sample import Sample

SKIPPED = "skipped.json"


def write_shards(
    reader: Reader, out: Path, size: int | None = None, per_shard: int = 128, skip_bad: bool = False
) -> ShardFolder:
    """Convert all samples of `reader` to the shard folder `out`, or return it if it is there, whole and the same.

    With `size` images and masks are stretched to size x size. A run that was killed leaves a folder without
    index.json; the next one writes it anew. With `skip_bad` what cannot be used is listed in skipped.json.

    Raises:
        UserError: a file cannot be used and `skip_bad` is not set, no file can be used, or `out` holds other files or
            shards made with other arguments.
    """
    made = {"reader": reader.dataset, **reader.arguments, "size": size, "per_shard": per_shard, "skip_bad": skip_bad}
    if (out / INDEX).exists():
        _check_same(out, read_index(out).get("made"), made)
        return ShardFolder.open(out)
    problems = list(reader.problems)
    if problems and not skip_bad:
        more = f" (and {len(problems) - 1} more such files)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; fix it or pass --skip-bad")
    _clear(out, reader.dataset)

    samples = _samples(reader, size, problems if skip_bad else None)
    shards: list[dict[str, Any]] = []
    while batch := list(islice(samples, per_shard)):
        shards.append(write_shard(out / f"{reader.dataset}-{len(shards):06d}.tar", batch))
    if not shards:
        raise UserError(f"none of {len(problems)} files can be used, the first because {problems[0]}")
    if skip_bad:
        write_json(out / SKIPPED, [{"file": str(bad.path), "problem": bad.problem} for bad in problems])
    write_index(out, reader.dataset, shards, skipped=len(problems), made=made)
    return ShardFolder.open(out)


def _samples(reader: Reader, size: int | None, skipped: list[BadFile] | None) -> Iterator[Sample]:
    """The samples with their groups, resized; bad ones go to `skipped` if there is such a list."""
    groups = reader.groups()
    for i in track(range(len(reader)), f"writing {reader.dataset} shards", "images"):
        try:
            sample = reader[i]
        except BadFile as bad:
            if skipped is None:
                raise UserError(f"{bad}; fix it or pass --skip-bad") from bad
            skipped.append(bad)
            continue
        image, mask = sample.image, sample.mask
        if size:
            image = resize_image(image, size, size)
            mask = None if mask is None else resize_mask(mask, size, size)
        yield Sample(sample.key, image, mask, {**sample.meta, "group": groups[i]})


def _check_same(out: Path, there: Any, wanted: dict[str, Any]) -> None:
    """Raise UserError unless the folder was made with the arguments `wanted`."""
    there = there if isinstance(there, dict) else {}
    differ = [
        f"{name} {json.dumps(there.get(name))}, not {json.dumps(wanted.get(name))}"
        for name in dict.fromkeys((*wanted, *there))
        if there.get(name) != wanted.get(name)
    ]
    if differ:
        raise UserError(f"{out} is there already, made with {'; '.join(differ)}; give another --out or remove it")


def _clear(out: Path, dataset: str) -> None:
    """Make `out`, and remove what a run that was killed left in it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder as --out")
    ours = re.compile(rf"{re.escape(dataset)}-\d{{6}}\.tar|{re.escape(SKIPPED)}|\..+\.tmp")
    left = list(out.iterdir()) if out.is_dir() else []
    if foreign := sorted(path.name for path in left if not ours.fullmatch(path.name)):
        raise UserError(f"{out} holds {foreign[0]!r}, which is not of a shard folder; give another --out")
    for path in left:
        path.unlink()
    out.mkdir(parents=True, exist_ok=True)


def summary(shards: ShardFolder) -> str:
    """Path, records and counts by class, for people."""
    classes = Counter(record.category for record in shards.records)
    counts = ", ".join(f"{number} {category}" for category, number in sorted(classes.items()))
    unlabeled = sum(not record.labeled for record in shards.records)
    masks = f", {unlabeled} of them without a mask" if unlabeled else ""
    return f"{shards.folder}: {len(shards)} records ({counts}){masks}"
