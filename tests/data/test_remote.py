"""Shards at URLs: every fault of a server is survived, or named in one line with the shard and its URL."""

import json
import shutil
import sys

import fsspec
import numpy as np
import pytest

from mgcc_dist.common.errors import UserError
from mgcc_dist.data import remote
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.remote import fetch, fetch_bytes, fetch_index, join, shown
from mgcc_dist.data.shard_cache import ShardCache
from tests.data.http_folder import serving

SHARD = "phantom-000001.tar"


@pytest.fixture
def folder(tmp_path):
    """Three shards of four images."""
    return write_shards(Phantoms(count=12, seed=1, size=16), tmp_path / "phantoms", per_shard=4).folder


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(remote, "DELAY", 0.0)
    monkeypatch.setattr(remote, "TIMEOUT", 0.3)
    fetch_index.cache_clear()
    with serving(folder) as server:
        yield server


def open_remote(server, tmp_path) -> ShardFolder:
    return ShardFolder.open(server.url, cache=ShardCache(tmp_path / "cache"))


def test_shards_at_a_url_are_read_like_local_ones_and_each_is_fetched_once(server, folder, tmp_path):
    here, there = ShardFolder.open(folder), open_remote(server, tmp_path)
    assert there.records == here.records
    assert there.content_sha256 == here.content_sha256
    assert there.index_sha256 == here.index_sha256
    for i in (11, 0, 5, 6):
        np.testing.assert_array_equal(there[i].image, here[i].image)
        np.testing.assert_array_equal(there[i].mask, here[i].mask)
    again = open_remote(server, tmp_path)
    assert [again[i].key for i in range(12)] == here.keys()
    assert set(server.requests.values()) == {1}


@pytest.mark.parametrize("faults", [["dropped"], ["truncated", "503"], ["stalled"], ["429", "dropped", "truncated"]])
def test_faults_that_pass_are_survived(server, folder, tmp_path, faults):
    server.faults[SHARD] = [*faults]
    sample = open_remote(server, tmp_path)[5]
    np.testing.assert_array_equal(sample.image, ShardFolder.open(folder)[5].image)
    assert server.requests[SHARD] == len(faults) + 1


@pytest.mark.parametrize(
    ("fault", "times", "reason"),
    [
        ("truncated", 9, r"5 attempts, the last error: the content ended after \d+ of \d+ bytes"),
        ("dropped", 9, "5 attempts, the last error: Remote end closed connection"),
        ("500", 9, "5 attempts, the last error: HTTP status 500"),
        ("404", 1, r"can't be read \(HTTP status 404\)"),
    ],
)
def test_faults_that_stay_are_named_with_the_url(server, tmp_path, fault, times, reason):
    server.faults[SHARD] = [fault] * times
    with pytest.raises(UserError, match=reason) as error:
        open_remote(server, tmp_path)[5]
    assert str(error.value).startswith(f"{server.url}/{SHARD}: ")
    assert server.requests[SHARD] == (1 if times == 1 else remote.ATTEMPTS)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_slow_answers_are_named(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    server.faults[SHARD] = ["stalled"]
    with pytest.raises(UserError, match=r"no answer for 0\.3 s"):
        open_remote(server, tmp_path)[5]


@pytest.mark.parametrize("change", ["longer", "other bytes", "shorter"])
def test_a_shard_that_changes_under_a_run_is_refused(server, folder, tmp_path, change):
    shards = open_remote(server, tmp_path)
    content = (folder / SHARD).read_bytes()
    changed = {"longer": content + b"x", "other bytes": b"x" + content[1:], "shorter": content[:-1]}[change]
    (folder / SHARD).write_bytes(changed)
    assert shards[0].key  # of another shard
    with pytest.raises(UserError, match="not the file that the index was made of") as error:
        shards[5]
    assert str(error.value).startswith(f"{server.url}/{SHARD}: ")
    assert server.requests[SHARD] == 1


def test_missing_and_damaged_indexes_are_named(server, folder):
    with pytest.raises(UserError, match=r"/elsewhere/index\.json: can't be read \(HTTP status 404\)"):
        ShardFolder.open(f"{server.url}/elsewhere")
    (folder / "index.json").write_text("<html>")
    with pytest.raises(UserError, match=r"index\.json: is not JSON .* Check the address"):
        ShardFolder.open(server.url)


def test_index_of_a_url_can_not_name_other_files(server, folder):
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["name"] = "../secret.tar"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is not a plain file name"):
        ShardFolder.open(server.url)


def test_pipe_reads_through_a_command_of_the_user(folder, tmp_path):
    spaced = tmp_path / "a folder"
    shutil.copytree(folder, spaced)
    shards = ShardFolder.open(f"pipe:cat '{spaced}'/{{}}", cache=ShardCache(tmp_path / "cache"))
    np.testing.assert_array_equal(shards[5].image, ShardFolder.open(folder)[5].image)


def test_pipe_quotes_the_name_and_names_a_failing_command(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "DELAY", 0.0)
    command = join("pipe:cat {}", "a; touch b")
    assert command == "pipe:cat 'a; touch b'"
    with pytest.raises(UserError, match="the command ended with exit code 1"):
        fetch_bytes(command)
    with pytest.raises(UserError, match=r"Write \{\} where the name of the file belongs"):
        join("pipe:cat x.tar", "x.tar")


def test_pipe_that_stalls_is_stopped(monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    with pytest.raises(UserError, match=r"no answer for 0\.1 s"):
        fetch_bytes("pipe:exec sleep 60")


def test_location_file_may_name_a_url_but_no_command(server, folder, tmp_path):
    """Whoever wrote the file would run a command here."""
    index_only = tmp_path / "index_only"
    index_only.mkdir()
    shutil.copy(folder / "index.json", index_only)
    (index_only / "location.txt").write_text(server.url + "\n")
    shards = ShardFolder.open(index_only, cache=ShardCache(tmp_path / "cache"))
    assert shards[0].key == shards.keys()[0]
    for text in ("", "nowhere", "\ufffe\n\n"):
        (index_only / "location.txt").write_text(text, encoding="utf-16")
        with pytest.raises(UserError, match=r"location\.txt: .* is not a folder or URL"):
            ShardFolder.open(index_only)
    (index_only / "location.txt").write_text(f"../{folder.name}")  # relative to the file
    assert len(ShardFolder.open(index_only)) == len(shards)
    (index_only / "location.txt").write_text(f"pipe:touch {tmp_path}/ran; cat {{}}")
    with pytest.raises(UserError, match=r"location\.txt: names a command"):
        ShardFolder.open(index_only)
    assert not (tmp_path / "ran").exists()


def test_fsspec_opens_other_urls(folder, tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    shards = ShardFolder.open("memory://bucket", cache=ShardCache(tmp_path / "cache"))
    np.testing.assert_array_equal(shards[5].image, ShardFolder.open(folder)[5].image)
    with pytest.raises(UserError, match=r"memory://nowhere/index\.json: can't be read"):
        ShardFolder.open("memory://nowhere")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/index\.json: .* is missing .*mgcc-dist\[s3\]"):
        ShardFolder.open("s3://bucket")
    with pytest.raises(UserError, match="Use https://, s3:// or pipe:"):
        ShardFolder.open("nosuch://bucket")


def test_passwords_and_signatures_are_not_in_messages(tmp_path):
    url = join("https://user:secret@host/data?signature=abc", "a b.tar")
    assert url == "https://user:secret@host/data/a%20b.tar?signature=abc"
    assert shown(url) == "https://host/data/a%20b.tar"
    assert shown(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://[::1/x", "Invalid IPv6 URL"),
        ("http://host:port/x", "Port could not be cast"),
        ("https:///x", "no host given"),
        ("http://a b/x?signature=abc", "its host has a space"),
    ],
)
def test_urls_that_can_not_exist_are_refused_at_once(url, reason):
    with pytest.raises(UserError, match=reason) as error:
        ShardFolder.open(url)
    assert str(error.value).startswith(f"{url.partition('?')[0]}: is not a valid URL (")


def test_urls_may_have_spaces_and_letters_outside_ascii(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "web" / "brüste 1")
    with serving(tmp_path / "web") as server:
        for name in ("brüste 1", "br%C3%BCste%201"):
            shards = ShardFolder.open(f"{server.url}/{name}", cache=ShardCache(tmp_path / name))
            assert shards[0].key == shards.keys()[0]


def test_errors_of_packages_behind_a_url_are_one_line(monkeypatch):
    class NoCredentialsError(Exception):
        """Not an OSError, as those of botocore."""

    def fail(*_, **__):
        raise NoCredentialsError("Unable to locate\ncredentials")

    monkeypatch.setattr(remote, "DELAY", 0.0)
    monkeypatch.setattr(fsspec, "open", fail)
    with pytest.raises(UserError, match="the last error: NoCredentialsError: Unable to locate credentials"):
        ShardFolder.open("s3://bucket")


def test_fetch_copies_local_files(folder, tmp_path):
    fetch(str(folder / SHARD), tmp_path / "copy", size=(folder / SHARD).stat().st_size)
    assert (tmp_path / "copy").read_bytes() == (folder / SHARD).read_bytes()
    with pytest.raises(UserError, match="No such file or directory"):
        fetch(str(folder / "gone.tar"), tmp_path / "copy")
