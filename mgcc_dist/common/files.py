"""Atomic writes: to a scratch file in the same folder, flushed to disk, then renamed."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mgcc_dist.common.errors import DISK_FULL, UserError


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a scratch path next to `path`. Sync it and rename it to `path` at the end; remove it on an exception.

    The file gets the permissions of any new file (umask), also if safetensors writes it, whose own are only the user's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.touch()
        mode = scratch.stat().st_mode
        yield scratch
        scratch.chmod(mode)
        if sync:
            with scratch.open("rb+") as file:
                os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def share_files(folder: Path) -> None:
    """Let those who may read `folder` read its files, which safetensors writes for their owner only."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(folder.stat().st_mode & 0o666)


def link(source: Path, path: Path) -> None:
    """Make `path` the same file as `source` by a hard link, or a copy where the file system has no links.

    All files are replaced and never changed in place, so a link keeps its content.
    """
    with replacing(path) as scratch:
        scratch.unlink()
        try:
            os.link(source, scratch)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            shutil.copyfile(source, scratch)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path`, in which its files are made, and delete it at the end.

    What killed processes of this machine left of earlier attempts at `path` is deleted first.

    Raises:
        UserError: the folder of `path` can't be created or written.
    """
    create_folder(path.parent)
    out, path = path, path.resolve()
    prefix = f".{path.name}.of.{socket.gethostname()}"
    for left in path.parent.iterdir():
        if left.name.startswith(f"{prefix}.") and _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    scratch = path.with_name(f"{prefix}.{os.getpid()}.tmp")
    try:
        scratch.mkdir()
    except OSError as error:
        raise UserError(f"--out {out}: can't be written ({error.strerror}). Choose another --out.") from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_scratch(folder: Path) -> None:
    """Delete the scratch files below `folder` that processes left which were killed in `replacing`.

    Call it only if no process on another machine writes there. Those of running processes on this one are kept.
    """
    for path in folder.rglob(".*.tmp"):
        if _is_abandoned(path) and not path.is_dir():
            path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    """Whether it is the scratch file or folder, `.NAME.PID.tmp`, of a process that no longer runs on this machine."""
    *_, pid, suffix = path.name.rsplit(".", 2)
    return suffix == "tmp" and pid.isdecimal() and not Path(f"/proc/{pid}").exists()


def create_folder(folder: Path) -> None:
    """Create an output folder, with its parents, if it does not exist.

    Raises:
        UserError: it is a file, or it can't be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder.is_file():
            raise UserError(f"--out {folder}: is a file. Give a folder.") from error
        raise UserError(f"--out {folder}: can't be created ({error.strerror}). Choose another --out.") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as scratch:
        scratch.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Raises ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


RESTORE = "Restore it, or move it elsewhere and rerun the command that writes it."


class InvalidJson(UserError, ValueError):
    """A file is not JSON; its text names the file."""


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InvalidJson: it is not JSON.
        UserError: it does not exist.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: does not exist. Restore it, or rerun the command that writes it.") from error
    except ValueError as error:  # also if it is not text
        raise InvalidJson(f"{path}: is not JSON ({error}). {RESTORE}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidJson: it is not JSON, or not an object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InvalidJson(f"{path}: is not a JSON object. {RESTORE}")
    return content


def read_versioned(path: Path, kind: str, version: int, remedy: str) -> dict[str, Any]:
    """Read the JSON object in `path`, whose `format` is `kind`.

    Raises:
        UserError: the file is not JSON, or has another format or version. The message ends with `remedy`, what to do.
    """
    try:
        content = read_json(path)
    except InvalidJson as error:
        raise UserError(f"{path}: is not JSON ({error.__cause__}). {remedy}") from error
    return check_versioned(content, str(path), kind, version, remedy)


def check_versioned(content: Any, name: str, kind: str, version: int, remedy: str) -> dict[str, Any]:
    """Return `content`, read from the file or URL `name`, if it is a JSON object as `read_versioned` expects it.

    Raises:
        UserError: it is not.
    """
    if not isinstance(content, dict) or content.get("format") != kind:
        raise UserError(f"{name}: is not a {kind} file. {remedy}")
    if content.get("version") != version:
        raise UserError(f"{name}: has version {content.get('version')}, not {version}. {remedy}")
    return content


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
