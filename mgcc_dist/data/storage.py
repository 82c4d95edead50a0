"""Where the shards of a data set are read: in their folder, or as copies in the node-local cache."""

import hashlib
import os
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.data.remote import fetch, is_url, join, shown
from mgcc_dist.data.shard_cache import ShardCache

REMEDY = "Restore it, or move the folder elsewhere and create it again."


class CorruptRecord(Exception):
    """A record's content is wrong; `RecordFolder` adds the shard and the key to the message."""


class Storage(Protocol):
    """The shards of a data set. An instance can be pickled or forked to DataLoader workers."""

    def open(self, name: str) -> IO[bytes]:
        """Return the open file of a shard, which the storage keeps and may close at the next call."""

    def describe(self, name: str) -> str:
        """Return the path or URL of a shard, for messages."""


class LocalShards:
    """Shards in a folder, each kept open once it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, IO[bytes]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def open(self, name: str) -> IO[bytes]:
        if name not in self._open:
            self._open[name] = (self.folder / name).open("rb")
        return self._open[name]

    def describe(self, name: str) -> str:
        return str(self.folder / name)


class CachedShards:
    """Shards at a location, each read from its copy in the cache."""

    def __init__(self, location: str, cache: ShardCache, shards: Sequence[dict[str, Any]]) -> None:
        self.location = location
        self.cache = cache
        self._shards = {shard["name"]: (shard["sha256"], shard["bytes"]) for shard in shards}
        for sha256, size in self._shards.values():
            cache.expect(sha256, size)

    def open(self, name: str) -> IO[bytes]:
        sha256, size = self._shards[name]
        return self.cache.open(sha256, partial(fetch, join(self.location, name), size=size, sha256=sha256))

    def describe(self, name: str) -> str:
        return shown(join(self.location, name))


def open_storage(location: str, shards: Sequence[dict[str, Any]], verify: bool, cache: ShardCache | None) -> Storage:
    """Open the shards that an index.json lists; `verify` checks the sha256 of local ones that are not copied.

    Raises:
        UserError: a local shard is missing or has different content.
    """
    if not is_url(location):
        for shard in shards:
            sha256 = shard["sha256"] if verify and not cache else None  # a copy is always verified
            _check_shard(Path(location) / shard["name"], shard["bytes"], sha256)
    return CachedShards(location, cache, shards) if cache else LocalShards(Path(location))


def _check_shard(path: Path, size: int, sha256: str | None) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing. {REMEDY}")
    if path.stat().st_size != size:
        raise UserError(f"{path}: has {path.stat().st_size} bytes, expected {size}. {REMEDY}")
    if sha256 and sha256_of(path) != sha256:
        raise UserError(f"{path}: its sha256 does not match index.json. {REMEDY}")


class OpenShard:
    """The byte range of each member of a tar file."""

    def __init__(self, open_file: Callable[[], IO[bytes]]) -> None:
        with tarfile.open(open_file().name, "r:") as tar:
            self.members = {member.name: (member.offset_data, member.size) for member in tar}
        self.open_file = open_file

    def bytes_of(self, member: str) -> bytes:
        if member not in self.members:
            raise CorruptRecord(f"{member} is missing")
        offset, size = self.members[member]
        # pread does not move the file position, which forked workers share.
        content = os.pread(self.open_file().fileno(), size, offset)
        if len(content) != size:
            raise CorruptRecord(f"{member} is truncated")
        return content

    def read_verified(self, member: str, sha256: str | None) -> bytes:
        """Read a member and check its sha256."""
        content = self.bytes_of(member)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise CorruptRecord(f"the sha256 of {member} does not match its json")
        return content
