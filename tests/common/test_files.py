"""Writes are atomic."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import (
    read_json,
    read_object,
    remove_scratch,
    replacing,
    scratch_folder,
    sha256_of,
    share_files,
    write_json,
    write_text,
)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_scratch_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail():
        with replacing(path) as scratch:
            scratch.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_users_may_read_what_safetensors_writes(tmp_path):
    before = os.umask(0o022)
    try:
        with replacing(tmp_path / "model.safetensors") as scratch:
            save_file({"a": torch.zeros(1)}, scratch)
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_files_of_a_library_get_the_permissions_of_their_folder(tmp_path):
    tmp_path.chmod(0o750)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    share_files(tmp_path)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_json_round_trip_creates_folders_and_refuses_nan(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert read_json(path) == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))


def test_sha256(tmp_path):
    write_text(tmp_path / "a", "abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_damaged_json_is_an_error_for_the_user_that_names_the_file(tmp_path, content):
    (tmp_path / "request.json").write_bytes(content)
    with pytest.raises(UserError, match=r"request\.json: is not JSON \("):
        read_json(tmp_path / "request.json")


def test_missing_or_other_json_is_an_error_for_the_user(tmp_path):
    with pytest.raises(UserError, match=r"a\.json: does not exist\. Restore it, or rerun"):
        read_json(tmp_path / "a.json")
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(UserError, match=r"a\.json: is not a JSON object\. Restore it, or move"):
        read_object(tmp_path / "a.json")


def test_scratch_files_of_killed_processes_are_removed_and_those_of_running_ones_kept(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "best").mkdir()
    stale, alive = (tmp_path / "best" / f".model.safetensors.{pid}.tmp" for pid in (gone.pid, os.getpid()))
    others = [tmp_path / name for name in (".mine.tmp", "a.1.tmp", ".notes", f".a.{gone.pid}.bak")]
    for path in [stale, alive, *others]:
        path.touch()
    remove_scratch(tmp_path)
    assert not stale.exists()
    assert all(path.exists() for path in [alive, *others])


def test_a_scratch_folder_is_deleted_at_the_end_and_by_the_next_attempt_after_a_kill(tmp_path, monkeypatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    with scratch_folder(tmp_path / "model.onnx") as scratch:
        assert list(tmp_path.iterdir()) == [scratch]
        name = scratch.name
    stale = name.replace(str(os.getpid()), str(gone.pid))
    kept = [name.replace(str(os.getpid()), "1"), stale.replace("onnx", "pt"), stale.replace(".of.", ".of.elsewhere-")]
    for each in [stale, *kept]:
        (tmp_path / each).mkdir()
        (tmp_path / each / "draft").touch()
    with scratch_folder(tmp_path / "model.onnx"):
        assert not (tmp_path / stale).exists()
    remove_scratch(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
    monkeypatch.chdir(tmp_path / kept[0])
    with scratch_folder(Path()) as scratch:
        assert scratch.parent == tmp_path
    with pytest.raises(UserError, match=r"--out /proc/a\.onnx: can't be written"), scratch_folder(Path("/proc/a.onnx")):
        pass
