"""Node-local cache of shards: each is copied once per node, and shared by its processes.

A copy is called by its sha256, so a shard that changes, or two data sets with one name, can't be mixed up. Files in the
folder: SHA256.tar, a complete copy; SHA256.lock, held by the process that makes the copy while the others wait; and
.SHA256.tar.PID.tmp, a copy in the making. A process holds a shared lock on the copies that it has open, and only copies
that nobody has open are deleted, the least recently opened first. The kernel releases the locks of killed processes.

webdataset's FileCache is not used: it calls copies by their URL, checks no content, and deletes copies in use.
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mgcc_dist.common.errors import DISK_FULL, UserError
from mgcc_dist.common.files import replacing
from mgcc_dist.data.remote import is_url

ROOM = "room.lock"
"""held while a process deletes copies and reserves the space for a new one"""
WAIT = 60.0  # seconds to wait until other processes close copies


class ShardCache:
    """The cache in `folder`, of at most `limit` bytes (0: no limit).

    If all shards of a run fit, its processes keep them open. Otherwise each process has one copy open at a time, so the
    limit must hold at least as many shards as there are processes on the node, and one more.
    """

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self.folder = folder / f"mgcc-shards-{os.getuid()}"  # others could change copies in a folder of theirs
        self.limit = limit
        self._sizes: dict[str, int] = {}
        self._open: dict[str, IO[bytes]] = {}
        self._create()

    def _create(self) -> None:
        """Create the folder, also if temporary files were deleted while the run has it open."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache: {self.folder.parent} can't be created ({error.strerror}). Choose another one."
            ) from error
        if self.folder.stat().st_uid != os.getuid():
            raise UserError(f"data.cache: {self.folder} belongs to another user. Choose another one.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def expect(self, sha256: str, size: int) -> None:
        """Count a shard that the run may open."""
        self._sizes[sha256] = size

    @property
    def holds_all(self) -> bool:
        """Whether all expected shards fit at once."""
        return not self.limit or sum(self._sizes.values()) <= self.limit

    def require_room(self, window: int | None) -> None:
        """Raise UserError unless all expected shards fit at once or the run reads only `window` of them at a time."""
        if not self.holds_all and not window:
            raise UserError(
                f"data.cache_gb: the shards have {sum(self._sizes.values()) / 1e9:.3g} GB and the cache only "
                f"{self.limit / 1e9:g} GB. Raise it, or set data.shard_window to the number of shards to read at once."
            )

    def open(self, sha256: str, copy: Callable[[Path], None]) -> IO[bytes]:
        """Return the open copy of an expected shard; the first process makes it with `copy`, the others wait.

        Raises:
            UserError: `copy` raised it, or there is no room for the copy.
        """
        if sha256 not in self._open:
            if not self.holds_all:
                self._close_all()
            self._create()
            try:
                while not (file := self._open_copy(sha256)):
                    with _locked(self.folder / f"{sha256}.lock"):
                        if not self._path(sha256).exists():
                            self._make(sha256, copy)
            except OSError as error:
                raise UserError(
                    f"data.cache: {self.folder} can't be used ({error.strerror}). Let this user write there, or choose "
                    "another one."
                ) from error
            self._open[sha256] = file
        return self._open[sha256]

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _open_copy(self, sha256: str) -> IO[bytes] | None:
        """Open and lock a complete copy; None if there is none."""
        try:
            file = self._path(sha256).open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        if status.st_nlink and status.st_size == self._sizes[sha256]:
            os.utime(file.fileno())  # for the order of deletion
            return file
        file.close()
        if status.st_nlink:  # something else has cut it
            self._path(sha256).unlink(missing_ok=True)
        return None

    def _close_all(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _make(self, sha256: str, copy: Callable[[Path], None]) -> None:
        try:
            with replacing(self._path(sha256)) as scratch:
                if self.limit:
                    self._reserve(scratch, self._sizes[sha256])
                copy(scratch)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise UserError(
                f"data.cache: {error.strerror} for {self.folder}. Choose a larger disk, or set data.cache_gb to "
                "less than is free."
            ) from error

    def _reserve(self, scratch: Path, size: int) -> None:
        """Give the file `scratch` its size, after deleting copies that nobody has open, if need be."""
        end = time.monotonic() + WAIT
        while True:
            with _locked(self.folder / ROOM):
                if self._make_room(size):
                    os.truncate(scratch, size)
                    return
            self._close_all()
            if size > self.limit or time.monotonic() > end:
                raise UserError(
                    f"data.cache_gb: {self.limit / 1e9:g} GB have no room for one more shard of {size / 1e9:.3g} GB, "
                    f"and all others in {self.folder} are open. Set it to at least one shard per process of this node, "
                    "and one more."
                )
            time.sleep(0.05)

    def _make_room(self, size: int) -> bool:
        for scratch in self.folder.glob(".*.tmp"):  # of killed processes: those of others are locked
            with _try_locked(self.folder / f"{scratch.name.split('.')[1]}.lock") as is_left_over:
                if is_left_over:
                    scratch.unlink(missing_ok=True)
        used = sum(path.stat().st_size for path in self.folder.glob(".*.tmp"))
        copies = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.folder.glob("*.tar"))
        used += sum(bytes_ for _, bytes_, _ in copies)
        for _, bytes_, path in copies:
            if used + size <= self.limit:
                break
            with _try_locked(path) as unused:
                if unused:
                    path.unlink()
                    used -= bytes_
        return used + size <= self.limit


def open_cache(folder: str | None, gigabytes: float = 0) -> ShardCache | None:
    """Open the cache that `data.cache` and `data.cache_gb` name; None without a folder.

    Raises:
        UserError: the folder can't be used, names an environment variable that is not set, or is missing.
    """
    if folder is None:
        if gigabytes:
            raise UserError("data.cache_gb: limits data.cache, which is not set. Set data.cache to a folder.")
        return None
    if is_url(folder):
        raise UserError(f"data.cache: {folder} is a URL. Choose a folder on a disk of this node.")
    expanded = os.path.expandvars(folder)
    if "$" in expanded:
        raise UserError(f"data.cache: {folder} names an environment variable that is not set here. Choose a folder.")
    return ShardCache(Path(expanded).expanduser(), int(gigabytes * 1e9))


def default_cache() -> ShardCache:
    """The cache for shards at URLs where none is named: in $SLURM_TMPDIR, or where temporary files belong ($TMPDIR)."""
    return ShardCache(Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"data.cache: {path.parent} is on a file system without locks ({error.strerror}). Choose a folder on a "
                "disk of this node."
            ) from error
        yield


@contextmanager
def _try_locked(path: Path) -> Iterator[bool]:
    """Yield whether the lock of an existing file was free; if so, hold it."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
