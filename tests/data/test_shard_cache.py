"""The node-local cache: one copy per node, bounded, and no copy in use is deleted."""

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import time

import pytest

from mgcc_dist.common.errors import UserError
from mgcc_dist.data import shard_cache
from mgcc_dist.data.shard_cache import ShardCache, default_cache, open_cache

SIZE = 1000


class Source:
    """Shards of SIZE bytes; `made` lists those that were copied."""

    def __init__(self, count: int) -> None:
        self.contents = [bytes([number]) * SIZE for number in range(count)]
        self.names = [hashlib.sha256(content).hexdigest() for content in self.contents]
        self.made: list[int] = []

    def cache(self, folder, limit: int = 0) -> ShardCache:
        cache = ShardCache(folder, limit)
        for name in self.names:
            cache.expect(name, SIZE)
        return cache

    def open(self, cache: ShardCache, number: int) -> bytes:
        def copy(path):
            self.made.append(number)
            path.write_bytes(self.contents[number])

        return os.pread(cache.open(self.names[number], copy).fileno(), 2 * SIZE, 0)


def copies(cache: ShardCache) -> set[str]:
    return {path.stem for path in cache.folder.glob("*.tar")}


def test_copies_are_reused_by_other_processes_and_later_runs(tmp_path):
    source = Source(3)
    for cache in (source.cache(tmp_path), source.cache(tmp_path)):
        for number in (0, 1, 2, 0):
            assert source.open(cache, number) == source.contents[number]
    assert source.made == [0, 1, 2]


def test_least_recently_used_copies_are_deleted_to_stay_below_the_limit(tmp_path):
    source = Source(5)
    cache = source.cache(tmp_path, limit=3 * SIZE)
    for number in (0, 1, 2, 0, 3):  # 1 is the oldest when 3 comes
        time.sleep(0.01)  # of the file system's clock
        source.open(cache, number)
        assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= 3 * SIZE
    assert copies(cache) == {source.names[number] for number in (2, 0, 3)}
    assert source.open(cache, 1) == source.contents[1]
    assert source.made == [0, 1, 2, 3, 1]


def test_copies_in_use_are_not_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "WAIT", 0.0)
    source = Source(3)
    mine, other = (source.cache(tmp_path, limit=2 * SIZE) for _ in range(2))
    source.open(mine, 0)
    for number in (1, 2):
        source.open(other, number)
    assert copies(mine) == {source.names[0], source.names[2]}
    third = source.cache(tmp_path, limit=2 * SIZE)
    with pytest.raises(UserError, match=r"data\.cache_gb: 2e-06 GB have no room for one more shard"):
        source.open(third, 1)
    assert source.open(mine, 0) == source.contents[0]


def test_copies_of_other_runs_make_room_for_a_run_that_fits(tmp_path):
    old, new = Source(3), Source(6)
    del new.names[:3], new.contents[:3]
    source_cache = old.cache(tmp_path)
    for number in range(3):
        old.open(source_cache, number)
    source_cache._close_all()
    cache = new.cache(tmp_path, limit=3 * SIZE)
    assert cache.holds_all
    for number in range(3):
        new.open(cache, number)
    assert copies(cache) == {*new.names}


def test_failed_copies_leave_nothing_and_cut_ones_are_made_again(tmp_path):
    source = Source(1)
    cache = source.cache(tmp_path, limit=SIZE)

    def fail(path):
        raise UserError("the server is down")

    with pytest.raises(UserError, match="the server is down"):
        cache.open(source.names[0], fail)
    assert not list(cache.folder.glob("*.tmp")) + list(cache.folder.glob("*.tar"))
    source.open(cache, 0)
    os.truncate(cache.folder / f"{source.names[0]}.tar", 10)
    assert source.open(source.cache(tmp_path), 0) == source.contents[0]


def copy_until_killed(folder):
    def copy(path):
        path.write_bytes(bytes(SIZE // 2))
        os.kill(os.getpid(), signal.SIGKILL)

    source = Source(2)
    source.cache(folder, limit=SIZE).open(source.names[1], copy)


def test_a_killed_process_leaves_neither_a_lock_nor_half_a_copy(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=copy_until_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    source = Source(2)
    cache = source.cache(tmp_path, limit=SIZE)
    assert len(list(cache.folder.glob(".*.tmp"))) == 1
    assert source.open(cache, 0) == source.contents[0]  # there is room for one
    assert not list(cache.folder.glob(".*.tmp"))
    assert source.open(cache, 1) == source.contents[1]


def copy_slowly(folder, log, number):
    source = Source(2)

    def copy(path):
        with log.open("a") as file:
            file.write(f"{number}\n")
        time.sleep(0.2)
        path.write_bytes(source.contents[0])

    assert os.pread(source.cache(folder).open(source.names[0], copy).fileno(), SIZE, 0) == source.contents[0]


def test_one_process_copies_while_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=copy_slowly, args=(tmp_path, tmp_path / "log", n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len((tmp_path / "log").read_text().split()) == 1


def test_folder_may_be_named_by_an_environment_variable(tmp_path, monkeypatch):
    assert open_cache(None) is None
    with pytest.raises(UserError, match=r"data\.cache_gb: limits data\.cache, which is not set"):
        open_cache(None, 1)
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    assert open_cache("$SLURM_TMPDIR/shards", 2.5).folder.parent == tmp_path / "job" / "shards"
    assert default_cache().folder.parent == tmp_path / "job"
    monkeypatch.delenv("SLURM_TMPDIR")
    with pytest.raises(UserError, match="names an environment variable that is not set"):
        open_cache("$SLURM_TMPDIR")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache: .*file can't be created"):
        open_cache(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"data\.cache: https://host/data is a URL\. Choose a folder"):
        open_cache("https://host/data")


def test_a_deleted_folder_is_created_again_and_an_unusable_one_is_named(tmp_path, monkeypatch):
    """As where old temporary files are deleted under a long run. The shard is not to blame."""
    source = Source(2)
    cache = source.cache(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert source.open(cache, 0) == source.contents[0]

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("mgcc_dist.data.shard_cache.replacing", refuse)
    with pytest.raises(UserError, match=r"^data\.cache: .*mgcc-shards-\d+ can't be used \(Permission denied\)\. "):
        source.open(cache, 1)


def test_cache_of_another_user_is_refused(tmp_path, monkeypatch):
    ShardCache(tmp_path)
    other = next(tmp_path.iterdir())
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    other.rename(tmp_path / "mgcc-shards-12345")
    with pytest.raises(UserError, match="belongs to another user"):
        ShardCache(tmp_path)
