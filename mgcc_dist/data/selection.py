"""Remove records from a folder of synthetic shards: apply a person's selection, or drop near-copies.

`selection.json` is what the page of `mgcc ldm curate` saves: the `request` of the samples it was made from, accepted
keys and rejected keys. Keys it does not name are left out too.
"""

import logging
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_versioned, sha256_of
from mgcc_dist.data.records import REQUEST, ShardFolder, copy_records, write_index

logger = logging.getLogger(__name__)

FORMAT = "mgcc-dist selection"
VERSION = 1
REMEDY = "Save it again from the page of `mgcc ldm curate`."


@dataclass(frozen=True)
class Selection:
    """The content of a selection.json; `samples` is the request of the samples it was made from."""

    samples: dict[str, Any]
    accepted: list[str]
    rejected: list[str]


def read_selection(path: Path) -> Selection:
    """Read a selection file.

    Raises:
        UserError: the file does not exist, is damaged, names a key twice or accepts no image.
    """
    if not path.is_file():
        raise UserError(f"{path}: does not exist. Save one from the page of `mgcc ldm curate`.")
    content = read_versioned(path, FORMAT, VERSION, REMEDY)
    lists = [content.get(name) for name in ("accepted", "rejected")]
    valid = all(isinstance(keys, list) and all(isinstance(key, str) for key in keys) for keys in lists)
    if not valid or not isinstance(content.get("samples"), dict):
        raise UserError(f"{path}: damaged, samples, accepted or rejected is missing. {REMEDY}")
    accepted, rejected = content["accepted"], content["rejected"]
    named: set[str] = set()
    for key in accepted + rejected:
        if key in named:
            raise UserError(f"{path}: names {key!r} twice. {REMEDY}")
        named.add(key)
    if not accepted:
        raise UserError(f"{path}: accepts no image. Accept some on the page and save it again.")
    return Selection(content["samples"], accepted, rejected)


def apply_selection(selection: Path, samples: Path, out: Path) -> int:
    """Copy the accepted records of the shard folder `samples` to the new folder `out`; return their number.

    Raises:
        UserError: the selection was made from other samples or names an unknown record, or `out` already exists.
    """
    chosen, shards = read_selection(selection), ShardFolder.open(samples)
    request = shards.index.get("request")
    if request is None or not is_synthetic(shards):
        raise UserError(f"{samples}: holds no samples of `mgcc ldm`. Pass its samples, such as OUT/samples.")
    now, then = request.get("count"), chosen.samples.get("count")
    extended = isinstance(now, int) and isinstance(then, int) and now > then  # the images it was made from are there
    for key in sorted(request.keys() | chosen.samples.keys()):
        if request.get(key) != chosen.samples.get(key) and not (key == "count" and extended):
            raise UserError(
                f"{selection}: made from samples with {key} {chosen.samples.get(key)}, but {samples} has "
                f"{key} {request.get(key)}. Apply it to the samples it was made from."
            )
    known = set(shards.keys())
    if unknown := [key for key in chosen.accepted + chosen.rejected if key not in known]:
        raise UserError(
            f"{selection}: {len(unknown)} of its records are not in {samples}, the first is {unknown[0]!r}. "
            "If near-copies were dropped since, run `mgcc ldm curate` again."
        )
    if out.exists():
        raise UserError(f"{out}: already exists. Choose another --out.")
    kept = set(chosen.accepted)
    facts = {"sha256": sha256_of(selection), "accepted": len(kept), "of": len(shards)}
    scratch = _write_subset(shards, lambda key: key in kept, out, request=request, selection=facts)
    scratch.rename(out)
    return len(kept)


def write_selected(shards: ShardFolder, keys: Collection[str], out: Path, **extra: Any) -> Path:
    """Copy the records `keys` of samples to a folder next to `out` and return it; `extra` goes to index.json."""
    carried = {key: shards.index[key] for key in ("request", "selection", "dropped") if key in shards.index}
    return _write_subset(shards, lambda key: key in keys, out, **carried, **extra)


def drop_records(folder: Path, keys: Collection[str]) -> None:
    """Rewrite the shard folder without the records `keys`, which index.json then lists as `dropped`.

    If the process is killed, either the old or the new folder remains, or neither (between the two renames): then
    `restore_dropped` brings the old one back.
    """
    shards = ShardFolder.open(folder)
    old = _set_aside(folder)
    shutil.rmtree(old, ignore_errors=True)
    dropped = sorted({*shards.index.get("dropped", []), *keys})
    request = shards.index["request"]
    scratch = _write_subset(shards, lambda key: key not in keys, folder, request=request, dropped=dropped)
    for path in (folder / REQUEST, *folder.glob("index-*.json")):
        shutil.copy(path, scratch)
    folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old)


def restore_dropped(folder: Path) -> None:
    """Bring back the shard folder that a killed `drop_records` had set aside, if it does not exist."""
    if not folder.exists() and _set_aside(folder).is_dir():
        _set_aside(folder).rename(folder)


def is_synthetic(shards: ShardFolder) -> bool:
    """Return whether `mgcc ldm` sampled the images."""
    return isinstance(shards.index.get("request"), dict)


def warn_if_synthetic(shards: ShardFolder) -> None:
    """Warn that scores on the validation part of samples are not those of real images."""
    if is_synthetic(shards):
        logger.warning(
            "data.shards: %s holds samples of `mgcc ldm`, so validation does not see real images.", shards.folder
        )


def provenance(shards: ShardFolder) -> dict[str, Any]:
    """Describe the synthetic images for a result file: their number, request, selection and dropped records."""
    index = shards.index
    return {
        "images": len(shards),
        "request": index.get("request"),
        "selection": index.get("selection"),
        "dropped": len(index.get("dropped", [])),
        **({"filter": index["filter"]} if "filter" in index else {}),
        "index_sha256": shards.index_sha256,
    }


def _set_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _write_subset(shards: ShardFolder, keep: Callable[[str], bool], folder: Path, **extra: Any) -> Path:
    """Write the records that `keep` accepts as a complete shard folder next to `folder`; return its path."""
    scratch = folder.with_name(f".{folder.name}.selecting")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    entries = []
    for shard in shards.index["shards"]:
        if kept := [record for record in shard["records"] if keep(record["key"])]:
            entries.append(copy_records(Path(shards.source) / shard["name"], scratch / shard["name"], kept))
    write_index(scratch, shards.dataset, entries, **extra)
    return scratch
