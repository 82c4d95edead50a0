"""The folder of corrections: pairs of image and mask that `mgcc shards folder` reads, and what each was made from.

Every file is written to a scratch file and renamed, the image before its mask: a mask always has its image. The line in
corrections.jsonl follows last. It says which file was corrected, so that after a restart it is left out.
"""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import create_folder, sha256_of, write_bytes
from mgcc_dist.common.lock import lock
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.masks import read_mask
from mgcc_dist.inference.results import png

RECORDS, SCORES = "corrections.jsonl", "scores.jsonl"
IMAGES, MASKS = "images", "masks"


class Conflict(UserError):
    """The mask on the disk is not the one that the page has shown."""


class Corrections:
    """The folder `folder`, created or reopened, and locked until the process ends.

    Raises:
        UserError: it holds something else, is in use, or can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        create_folder(folder)
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if others and not (folder / RECORDS).is_file():
            raise UserError(
                f"--out {folder}: holds {others[0]!r} and is not a folder of corrections. Choose another --out."
            )
        lock(folder)
        try:
            (folder / RECORDS).open("a").close()
        except OSError as error:
            raise UserError(f"--out {folder}: can't be written ({error.strerror}). Choose another --out.") from error
        self._lock = threading.Lock()
        self._records = {record["file"]: record for record in read_lines(folder / RECORDS) if "file" in record}

    def is_corrected(self, name: str, source_sha256: str) -> bool:
        """Return whether this image, and not another one of its name, has a correction."""
        record = self._records.get(name)
        same = record is not None and record.get("source_sha256") == source_sha256
        return same and self._path(MASKS, name).is_file()

    def count(self) -> int:
        return len(self._records)

    def has_record(self, name: str) -> bool:
        return name in self._records

    def revision(self, name: str) -> str:
        """Return what identifies the mask on the disk; "" if there is none."""
        path = self._path(MASKS, name)
        return sha256_of(path) if path.is_file() else ""

    def mask(self, name: str, shape: tuple[int, int]) -> np.ndarray | None:
        """Return the mask on the disk, uint8 [H,W] of 0 and 255; None without one of this shape."""
        path = self._path(MASKS, name)
        try:
            mask = read_mask(path, ())[0] if path.is_file() else None
        except BadFile:  # by another program; saving replaces it only after a question
            return None
        return mask if mask is not None and mask.shape == shape else None

    def save(self, name: str, image: np.ndarray, mask: np.ndarray, revision: str, record: dict[str, Any]) -> str:
        """Write a pair; returns the new revision.

        Args:
            mask: uint8 [H,W] of 0 and 255.
            revision: of the mask that the person has seen.
            record: for corrections.jsonl.

        Raises:
            Conflict: the mask was changed since.
        """
        with self._lock:
            if self.revision(name) != revision:
                raise Conflict(f"{name}: its mask was saved by another tab or program since this page read it")
            content = png(mask)
            digest = hashlib.sha256(content).hexdigest()
            write_bytes(self._path(IMAGES, name), png(image))
            write_bytes(self._path(MASKS, name), content)
            record = {"file": name, **record, "mask_sha256": digest}
            append_line(self.folder / RECORDS, record)
            self._records[name] = record
            return digest

    def _path(self, kind: str, name: str) -> Path:
        path = self.folder / kind / f"{name}.png"
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise UserError(f"{path}: is outside of --out. Remove the link that leads there.")
        return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON Lines file that may not exist; a line that a kill cut off is left out."""
    objects = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            objects.append(entry)
    return objects


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Append an object to a JSON Lines file and flush it to disk; begins a new line after one that was cut off."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
