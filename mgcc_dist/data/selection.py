"""A folder of synthetic shards without some of its records, and the file by which a person says which.

`selection.json` is what the page of `curate` saves: the samples it is of (their `request`), the keys that were accepted
and the keys that were rejected. Keys that it does not name are left out, too.
"""

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_versioned, sha256_of
from mgcc_dist.data.records import INDEX, ShardFolder, write_index, write_shard

FORMAT = "mgcc-dist selection"
VERSION = 1


@dataclass(frozen=True)
class Selection:
    """What a selection.json says; `samples` is the request of the samples that it is of."""

    samples: dict[str, Any]
    accepted: list[str]
    rejected: list[str]


def read_selection(path: Path) -> Selection:
    """The selection in `path`.

    Raises:
        UserError: it is not there, is damaged, names a key twice or accepts none.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there; the page of `python -m mgcc_dist.ldm curate` saves it")
    content = read_versioned(path, FORMAT, VERSION, "save one from the page of `python -m mgcc_dist.ldm curate`")
    lists = [content.get(name) for name in ("accepted", "rejected")]
    whole = all(isinstance(keys, list) and all(isinstance(key, str) for key in keys) for keys in lists)
    if not whole or not isinstance(content.get("samples"), dict):
        raise UserError(f"{path} is damaged: samples, accepted or rejected is missing; save it again from the page")
    accepted, rejected = content["accepted"], content["rejected"]
    named: set[str] = set()
    for key in accepted + rejected:
        if key in named:
            raise UserError(f"{path} names {key!r} twice; save it again from the page")
        named.add(key)
    if not accepted:
        raise UserError(f"{path} accepts no image")
    return Selection(content["samples"], accepted, rejected)


def apply(selection: Path, samples: Path, out: Path) -> int:
    """Write the accepted records of the shard folder `samples` as the folder `out`; their number. `samples` stays.

    Raises:
        UserError: the selection is of other samples or names a record that is not there, or `out` is there already.
    """
    chosen, shards = read_selection(selection), ShardFolder.open(samples)
    made = shards.index.get("request", {})
    for key in sorted(made.keys() | chosen.samples.keys()):
        if made.get(key) != chosen.samples.get(key):
            raise UserError(
                f"{selection} is of samples with {key} {chosen.samples.get(key)}, but {samples} holds those with "
                f"{made.get(key)}; apply it to the samples that it was made of"
            )
    known = set(shards.keys())
    if unknown := [key for key in chosen.accepted + chosen.rejected if key not in known]:
        raise UserError(
            f"{selection} names {len(unknown)} records that {samples} lacks, {unknown[0]!r} first; "
            "if near-copies were dropped since, curate again"
        )
    if out.exists():
        raise UserError(f"{out} is there already; delete it, or give another --out")
    kept = set(chosen.accepted)
    facts = {"sha256": sha256_of(selection), "accepted": len(kept), "of": len(shards)}
    scratch = _write(shards, lambda key: key in kept, out, request=made, selection=facts)
    scratch.rename(out)
    return len(kept)


def drop(folder: Path, keys: Collection[str]) -> None:
    """Write the shard folder again without the records `keys`, which index.json then names as `dropped`.

    A kill leaves the old folder or the new one, or, between two renames, none: then sampling makes it again.
    """
    shards = ShardFolder.open(folder)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    dropped = sorted({*shards.index.get("dropped", []), *keys})
    scratch = _write(shards, lambda key: key not in keys, folder, request=shards.index["request"], dropped=dropped)
    shutil.copy(folder / "request.json", scratch)
    folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old)


def _write(shards: ShardFolder, keeps: Callable[[str], bool], folder: Path, **extra: Any) -> Path:
    """Write the records that `keeps` as a whole shard folder beside `folder`; its path."""
    scratch = folder.with_name(f".{folder.name}.selecting")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    entries = []
    for shard in shards.index["shards"]:
        kept = [record["key"] for record in shard["records"] if keeps(record["key"])]
        if kept:
            samples = (shards.read(shards.position(key)) for key in kept)
            entries.append(write_shard(scratch / shard["name"], samples))
    write_index(scratch, shards.dataset, entries, **extra)
    return scratch


def origin(shards: ShardFolder) -> dict[str, Any]:
    """What a result says of the synthetic images it was made with: their number, request, selection and drops."""
    index = shards.index
    return {
        "images": len(shards),
        "request": index.get("request"),
        "selection": index.get("selection"),
        "dropped": len(index.get("dropped", [])),
        "index_sha256": sha256_of(shards.folder / INDEX),
    }
