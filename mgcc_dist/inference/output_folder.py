"""The output folder of `mgcc predict`, in which a file that somebody else wrote or changed is never lost.

`written.jsonl` lists the sha256 of every file that this program wrote there. Only a file whose content is on that list
is replaced or deleted. Any other file, such as a mask corrected by hand, is kept and named.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_json, remove_scratch, replacing, sha256_of, write_json, write_text
from mgcc_dist.common.lock import LOCK, lock

FOLDERS = ("masks", "overlays", "probabilities", "contours", "uncertainty")
MASKS, OVERLAYS, PROBABILITIES, CONTOURS, UNCERTAINTY = FOLDERS
PREDICTIONS, SKIPPED, CONTENTS = "predictions.csv", "skipped.csv", "predict.json"
WRITTEN, IMAGES = "written.jsonl", "images.jsonl"
SCRATCH = re.compile(r"\..+\.\d+\.tmp")
"""what a kill may leave of a file that was being written"""


class OutputFolder:
    """The folder `path`, opened for the prediction that `contents` describes (predict.json)."""

    def __init__(self, path: Path, contents: dict[str, Any]) -> None:
        self.path = path
        self.contents = contents
        self.kept: list[str] = []
        """files that were not replaced, because this program did not write their content"""
        self._written = _read_hashes(path / WRITTEN)
        self._predicted: set[str] = set()
        self._unsynced: list[str] = []

    def open(self, overwrite: bool) -> None:
        """Create the folder, or check that it holds earlier predictions; with `overwrite`, delete them.

        Raises:
            UserError: it holds other files, predictions of other images or weights, or, with `overwrite`, predictions
                that were changed.
        """
        existing = [path.name for path in sorted(self.path.iterdir())] if self.path.is_dir() else []
        existing = [name for name in existing if name != LOCK]
        if existing and CONTENTS not in existing:
            raise UserError(
                f"--out {self.path}: holds {existing[0]!r} and is not a folder of predictions. Choose another --out."
            )
        if existing and not overwrite:
            self._check_contents()
            return
        lock(self.path)
        if overwrite:
            self._delete_own()
        write_json(self.path / CONTENTS, self.contents)

    def is_finished(self, images: dict[str, str]) -> bool:
        """Return whether all these images, sha256 by file, are predicted; earlier versions did not write the sha256."""
        if not (self.path / PREDICTIONS).is_file():
            return False
        listed = _read_hashes(self.path / IMAGES)
        return all(sha256 in listed.get(file, {sha256}) for file, sha256 in images.items())

    def reopen(self, names: Iterable[str]) -> None:
        """Lock the folder, and delete the tables and every earlier output of this program that is not one of `names`.

        Raises:
            UserError: another process uses the folder, or a table was changed, so the new one can't replace it.
        """
        lock(self.path)
        for table in (PREDICTIONS, SKIPPED):
            if (self.path / table).exists() and not self._is_own(table):
                raise UserError(
                    f"{self.path / table}: was changed, or not written by this version of `mgcc predict`. "
                    "Move it elsewhere and rerun, or choose another --out."
                )
        remove_scratch(self.path)
        expected = set(names)
        for name in self._files():
            if name not in expected:
                self._delete(name)

    def write(self, name: str, content: bytes) -> None:
        """Write a file, unless a file of that name exists that this program did not write: then keep that one.

        It is not flushed to disk before `sync`, because waiting for each of the files of a cine takes longer than the
        rest.
        """
        digest = sha256(content).hexdigest()
        if self._register(name, digest):
            with replacing(self.path / name, sync=False) as scratch:
                scratch.write_bytes(content)
            self._unsynced.append(name)

    def sync(self) -> None:
        """Flush to disk what was written; before the tables, which say that it is there."""
        for name in self._unsynced:
            with (self.path / name).open("rb") as file:
                os.fsync(file.fileno())
        self._unsynced = []

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a scratch path for a file that is written in parts; at the end it counts as in `write`."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield scratch
            if self._register(name, sha256_of(scratch)):
                scratch.replace(path)
                self._unsynced.append(name)
        finally:
            scratch.unlink(missing_ok=True)

    def _register(self, name: str, digest: str) -> bool:
        """Return whether a file of this content is to be written, and list it as this program's."""
        path = self.path / name
        self._predicted.add(name)
        unchanged = path.is_file() and sha256_of(path) == digest
        if path.exists() and not unchanged and not self._is_own(name):
            self.kept.append(name)
            return False
        # The line first: a file without one would count as somebody else's if the process is killed in between.
        with (self.path / WRITTEN).open("a") as file:
            file.write(_line(name, digest))
        self._written.setdefault(name, set()).add(digest)
        return not unchanged

    def finish(self, images: dict[str, str]) -> None:
        """Leave one line per file in the list, and one per image, sha256 by file, in that of the images.

        Outputs of images that could be read in an earlier run, and not in this one, are deleted.
        """
        self.sync()
        for name in self._files():
            if name not in self._predicted and name not in self.kept:
                self._delete(name)
        write_text(self.path / IMAGES, "".join(_line(file, sha256) for file, sha256 in images.items()))
        lines = [_line(name, sha256_of(self.path / name)) for name in self._files() if self._is_own(name)]
        write_text(self.path / WRITTEN, "".join(lines))

    def _is_own(self, name: str) -> bool:
        path, digests = self.path / name, self._written.get(name)
        # An empty file is what a loss of power may leave of one that was not flushed yet.
        return digests is not None and path.is_file() and (path.stat().st_size == 0 or sha256_of(path) in digests)

    def _files(self) -> list[str]:
        """The outputs that exist, of this program or of somebody else, without predict.json."""
        files = [path for folder in FOLDERS for path in (self.path / folder).rglob("*") if path.is_file()]
        files = [path for path in files if not SCRATCH.fullmatch(path.name)]
        files += [path for name in (PREDICTIONS, SKIPPED) if (path := self.path / name).exists()]
        return sorted(path.relative_to(self.path).as_posix() for path in files)

    def _delete(self, name: str) -> None:
        """Delete the file if it is this program's own, with the folders that it leaves empty."""
        if not self._is_own(name):
            self.kept.append(name)
            return
        path = self.path / name
        path.unlink()
        for folder in path.parents:
            if folder == self.path or any(folder.iterdir()):
                break
            folder.rmdir()

    def _delete_own(self) -> None:
        changed = [name for name in self._files() if not self._is_own(name)]
        if changed:
            raise UserError(
                f"--overwrite: {len(changed)} files in {self.path} were changed, or not written by `mgcc predict`: "
                f"{list_names(changed)}. Move them elsewhere and rerun, or choose another --out."
            )
        for name in self._files():
            self._delete(name)
        (self.path / WRITTEN).unlink(missing_ok=True)
        self._written = {}

    def _check_contents(self) -> None:
        path = self.path / CONTENTS
        try:
            earlier = read_json(path)
        except ValueError as error:
            raise UserError(f"{path}: damaged. Pass --overwrite to replace these predictions.") from error
        if not isinstance(earlier, dict):
            raise UserError(f"{path}: damaged. Pass --overwrite to replace these predictions.")
        keys = dict.fromkeys([*self.contents, *earlier])
        # The same weights are the same at another path, such as a shipped model's after the package was reinstalled.
        if differing := [key for key in keys if key != "weights" and earlier.get(key) != self.contents.get(key)]:
            raise UserError(
                f"--out {self.path}: holds predictions with other {' and '.join(differing)} (see its {CONTENTS}). "
                "Choose another --out, or pass --overwrite to replace them."
            )


def list_names(names: list[str]) -> str:
    """The first names, and how many more there are, on one line."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name)[1:-1] for name in names[:5]) + more


def _line(name: str, digest: str) -> str:
    return json.dumps({"file": name, "sha256": digest}) + "\n"


def _read_hashes(path: Path) -> dict[str, set[str]]:
    """All hashes in the list by file name; a line that was cut off by a kill is left out."""
    written: dict[str, set[str]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            written.setdefault(entry["file"], set()).add(entry["sha256"])
        except (ValueError, KeyError, TypeError):
            continue
    return written
