"""A folder of synthetic shards without some of its records."""

import shutil
from collections.abc import Collection
from pathlib import Path

from mgcc_dist.data.records import ShardFolder, write_index, write_shard


def drop(folder: Path, keys: Collection[str]) -> None:
    """Write the shard folder again without the records `keys`, which index.json then names as `dropped`.

    A kill leaves the old folder or the new one, or, between two renames, none: then sampling makes it again.
    """
    shards = ShardFolder.open(folder)
    scratch, old = folder.with_name(f".{folder.name}.selecting"), folder.with_name(f".{folder.name}.old")
    for leftover in (scratch, old):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir()
    entries = []
    for shard in shards.index["shards"]:
        kept = [record["key"] for record in shard["records"] if record["key"] not in keys]
        if kept:
            samples = (shards.read(shards.position(key)) for key in kept)
            entries.append(write_shard(scratch / shard["name"], samples))
    dropped = sorted({*shards.index.get("dropped", []), *keys})
    write_index(scratch, shards.dataset, entries, request=shards.index["request"], dropped=dropped)
    shutil.copy(folder / "request.json", scratch)
    folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old)
