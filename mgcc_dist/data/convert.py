"""Convert a dataset to a shard folder: resize, group, write shards, then index.json."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import write_json
from mgcc_dist.common.lock import LOCK, lock
from mgcc_dist.common.progress import track
from mgcc_dist.common.words import counted
from mgcc_dist.data.images import BadFile, resize_image, resize_mask
from mgcc_dist.data.mask_summary import MaskSummary
from mgcc_dist.data.readers.reader import Reader
from mgcc_dist.data.records import INDEX, ShardFolder, read_index, write_index, write_shard
from mgcc_dist.data.sample import Sample

SKIPPED = "skipped.json"
UNFINISHED = ".unfinished"
"""empty file that is in a folder from the start of a conversion to its end: the shards next to it are not complete"""
CONTENT = {"files", "contents_sha256", "lists_sha256"}
"""what `made` in index.json says about the content of the dataset's files"""


def write_shards(
    reader: Reader, out: Path, size: int | None = None, per_shard: int = 128, skip_bad: bool = False
) -> ShardFolder:
    """Convert all samples of `reader` to the shard folder `out`; a complete folder made from the same input is kept.

    With `size` images and masks are stretched to size x size. An interrupted run leaves a folder with UNFINISHED and
    without index.json, whose shards the next run rewrites. With `skip_bad` unusable files are listed in skipped.json.

    Raises:
        UserError: a file is unusable and `skip_bad` is not set, no file is usable, `out` contains files that an
            interrupted run did not write or shards made with other arguments, or another process uses it.
    """
    arguments = {
        "reader": reader.kind,
        **reader.arguments,
        "size": size,
        "per_shard": per_shard,
        "skip_bad": skip_bad,
    }
    if _is_complete(out, arguments):
        return ShardFolder.open(out)
    bad_files = list(reader.bad_files)
    if bad_files and not skip_bad:
        others = len(bad_files) - 1
        more = f" ({others} more bad file{'s' if others > 1 else ''})" if others else ""
        raise UserError(f"{bad_files[0]}{more}. Fix it or pass --skip-bad.")
    _prepare_folder(out, reader.dataset)
    if _is_complete(out, arguments):
        return ShardFolder.open(out)

    masks = MaskSummary()
    samples = _read_samples(reader, size, bad_files if skip_bad else None, masks)
    shards: list[dict[str, Any]] = []
    while batch := list(islice(samples, per_shard)):
        shards.append(write_shard(out / f"{reader.dataset}-{len(shards):06d}.tar", batch))
    if not shards:
        raise UserError(f"none of the {len(bad_files)} files is usable. The first error is {bad_files[0]}")
    if skip_bad:
        write_json(out / SKIPPED, [{"file": str(bad.path), "problem": bad.reason} for bad in bad_files])
    write_index(out, reader.dataset, shards, skipped=len(bad_files), made=arguments, masks=masks.to_index())
    (out / UNFINISHED).unlink()
    return ShardFolder.open(out)


def summarize(shards: ShardFolder) -> str:
    """Describe a shard folder in a line: path, number of records, counts by class."""
    classes = Counter(record.category for record in shards.records)
    counts = ", ".join(f"{number} {category}" for category, number in sorted(classes.items()))
    unlabeled = sum(not record.labeled for record in shards.records)
    with_mask = f", {len(shards) - unlabeled} with a mask" if 0 < unlabeled < len(shards) else ""
    without_mask = f"{with_mask}, {unlabeled} without a mask" if unlabeled else ""
    return f"{shards.folder}: {counted(len(shards), 'record')} ({counts}){without_mask}"


def _read_samples(
    reader: Reader, size: int | None, skipped: list[BadFile] | None, masks: MaskSummary
) -> Iterator[Sample]:
    """Yield the resized samples with their groups; bad files go to `skipped` if it is a list, counts to `masks`."""
    groups = reader.groups()
    for i in track(range(len(reader)), f"writing {reader.dataset} shards", "images"):
        try:
            sample = reader[i]
        except BadFile as bad:
            if skipped is None:
                raise UserError(f"{bad}. Fix it or pass --skip-bad.") from bad
            skipped.append(bad)
            continue
        image, mask = sample.image, sample.mask
        if size:
            image = resize_image(image, size, size)
            mask = None if mask is None else resize_mask(mask, size, size)
        masks.add(sample.key, sample.mask, mask, reader.mask_facts.get(sample.key, []))
        yield Sample(sample.key, image, mask, {**sample.meta, "group": groups[i]})


def _is_complete(out: Path, arguments: dict[str, Any]) -> bool:
    """Return whether `out` is a complete shard folder. Raises UserError if it was made with other arguments."""
    if not (out / INDEX).exists():
        return False
    _check_same(out, read_index(out).get("made"), arguments)
    return True


def _check_same(out: Path, found: Any, wanted: dict[str, Any]) -> None:
    """Raise UserError unless the folder was made with the arguments `wanted`."""
    remedy = "Choose another --out."
    if not isinstance(found, dict):
        raise UserError(f"{out}: already exists, and `mgcc shards` did not make it. {remedy}")
    if "names_and_sizes_sha256" in found:
        raise UserError(f"{out}: made by version 0.1, which read and resized masks in another way. {remedy}")
    differences = [
        f"{name} {json.dumps(found.get(name))}, not {json.dumps(wanted.get(name))}"
        for name in dict.fromkeys((*wanted, *found))
        if found.get(name) != wanted.get(name)
    ]
    if differences and {name for name in {*wanted, *found} if found.get(name) != wanted.get(name)} <= CONTENT:
        raise UserError(
            f"{out}: stale, files of the data set have changed since it was made "
            f"({found.get('files')} files then, {wanted.get('files')} now). {remedy}"
        )
    if differences:
        raise UserError(f"{out}: already exists, made with {'; '.join(differences)}. {remedy}")


def _prepare_folder(out: Path, dataset: str) -> None:
    """Create `out`, lock it, and remove what an interrupted run left in it.

    Raises:
        UserError: another process uses it, or it contains anything else.
    """
    own_file = re.compile(rf"{re.escape(dataset)}-\d{{6}}\.tar|{re.escape(SKIPPED)}|\..+\.tmp")
    interrupted = (out / UNFINISHED).is_file()
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if path.name not in (LOCK, UNFINISHED) and not (interrupted and own_file.fullmatch(path.name)):
            raise UserError(
                f"{out}: contains {path.name!r}, which no interrupted conversion of {dataset!r} wrote. "
                "Choose another --out."
            )
    lock(out)
    if (out / INDEX).exists():  # another process completed it in the meantime
        return
    (out / UNFINISHED).touch()
    for path in out.iterdir():
        if own_file.fullmatch(path.name):
            path.unlink()
