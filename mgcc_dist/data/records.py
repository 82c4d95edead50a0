"""The shard format: WebDataset tars of grey images with masks, and an index.json that says what a folder holds.

A record is `{key}.png` (8-bit grey), `{key}.mask.png` (8-bit, 0 or 255; absent when unlabeled) and `{key}.json` (the
`meta` of its Sample). Any `webdataset` reader can read it. index.json is written last, so a folder without it is
half-written; it names each shard with its size and sha256 and each record with its class and split group. Shards are
byte-reproducible: the same samples give the same file (with the same Pillow, whose zlib compresses the PNGs).
"""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_versioned, replacing, sha256_of, write_json

FORMAT = "mgcc-dist shards"
VERSION = 1
INDEX = "index.json"

Record = TypeVar("Record")


@dataclass(frozen=True, eq=False)
class Sample:
    """One image, with its mask when it is labeled.

    `key` has no dots and no slashes (BUSI: the stem as published, "benign (433)"). `image` is uint8 [H,W]; `mask` is
    uint8 [H,W] of 0 and 255, or None. `meta`: "dataset", "class", "original_size" [width, height], "group" (records
    of one group belong on one side of a split); synthetic images add "checkpoint", "seed", "index". `write_shard`
    adds "sha256" and "mask_sha256", those of the PNG files.
    """

    key: str
    image: np.ndarray
    mask: np.ndarray | None
    meta: dict[str, Any]


@dataclass(frozen=True)
class RecordInfo:
    """What index.json says of a record; `category` is "class" there."""

    key: str
    shard: str
    labeled: bool
    category: str
    group: str


def is_key(text: str) -> bool:
    """Whether `text` can be the key of a record in a tar."""
    return bool(text) and all(letter not in "./" and letter.isprintable() for letter in text)


def write_shard(path: Path, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write one tar, by rename, and return its entry for `write_index`.

    `meta` without "class" counts as "unknown", without "group" as a group of its own.

    Raises:
        UserError: a key that no tar record can have.
        ValueError: arrays of another shape, type or value than `Sample` says.
    """
    return write_records(path, map(_encode, samples))


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Write one tar of records as TarWriter takes them, by rename, and return its entry for `write_index`.

    A record is file contents by extension, and `__key__`; its "json" has "class" and "group".
    """
    written = []
    with (
        replacing(path) as scratch,
        scratch.open("wb") as file,
        TarWriter(file, encoder=False, mtime=0, user="mgcc-dist", group="mgcc-dist") as tar,
    ):
        for record in records:
            tar.write(record)
            meta = json.loads(record["json"])
            labeled = "mask.png" in record
            written.append(
                {"key": record["__key__"], "class": meta["class"], "labeled": labeled, "group": meta["group"]}
            )
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path), "records": written}


def write_index(folder: Path, dataset: str, shards: list[dict[str, Any]], kind: str = FORMAT, **extra: Any) -> None:
    """Write index.json, which makes the folder a whole one; `extra` keys are stored beside the others.

    Raises:
        UserError: two records with one key.
    """
    records = [record for shard in shards for record in shard["records"]]
    for key, times in Counter(record["key"] for record in records).items():
        if times > 1:
            raise UserError(f"{folder}: {times} records have the key {key!r}; rename the files they come from")
    index = {
        "format": kind,
        "version": VERSION,
        "dataset": dataset,
        "records": len(records),
        "labeled": sum(record["labeled"] for record in records),
        "classes": dict(sorted(Counter(record["class"] for record in records).items())),
        **extra,
        "shards": shards,
    }
    write_json(folder / INDEX, index)


class RecordFolder:
    """A whole folder of shards with random access to its records, in the order of index.json; of any format.

    Files are opened when first read and by each process for itself, so an instance may be pickled or forked to
    DataLoader workers.
    """

    FORMAT: ClassVar[str]

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.index = index
        self.dataset: str = index["dataset"]
        self.records = [
            RecordInfo(record["key"], shard["name"], record["labeled"], record["class"], record["group"])
            for shard in index["shards"]
            for record in shard["records"]
        ]
        self._positions = {record.key: position for position, record in enumerate(self.records)}
        self._open: dict[str, OpenShard] = {}

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Self:
        """Read index.json and look at the shards it names; with `verify` also at their sha256.

        Raises:
            UserError: no such folder, half-written, index.json unreadable, a shard missing or of other content.
        """
        index = read_index(folder, cls.FORMAT)
        try:
            opened = cls(folder, index)
            for shard in index["shards"]:
                _check_shard(folder / shard["name"], shard["bytes"], shard["sha256"] if verify else None)
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / INDEX} is damaged ({error!r}); remove the folder and make it again") from error
        return opened

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def keys(self) -> list[str]:
        return [record.key for record in self.records]

    def position(self, key: str) -> int:
        """The place of `key` in `records`.

        Raises:
            UserError: there is no such record.
        """
        if key not in self._positions:
            raise UserError(f"{self.folder} has no record {key!r}; is the split made for another data set?")
        return self._positions[key]

    def read_as(self, i: int, decode: "Callable[[OpenShard, RecordInfo], Record]") -> Record:
        """Read record `i` by `decode`.

        Raises:
            UserError: the record is missing, cut off or `decode` finds it corrupt; the message names shard and key.
        """
        info = self.records[i]
        path = self.folder / info.shard
        try:
            if info.shard not in self._open:
                self._open[info.shard] = OpenShard(path)
            return decode(self._open[info.shard], info)
        except (CorruptRecord, OSError, tarfile.TarError, ValueError) as error:
            raise UserError(
                f"{path}: record {info.key!r} is corrupt: {error}; remove the folder and make it again"
            ) from error


class ShardFolder(RecordFolder):
    """A whole shard folder of images."""

    FORMAT = FORMAT

    def read(self, i: int) -> Sample:
        """Read record `i`; its pixels have the sha256 that was written with them.

        Raises:
            UserError: it can't be read, or has another sha256.
        """
        return self.read_as(i, _decode)


def read_index(folder: Path, kind: str = FORMAT) -> dict[str, Any]:
    """The content of index.json.

    Raises:
        UserError: no such folder, half-written, not JSON, or of another format or version.
    """
    path = folder / INDEX
    if not folder.is_dir():
        raise UserError(f"{folder} is not there; make it with `python -m mgcc_dist.shards`")
    if not path.is_file():
        raise UserError(f"{folder} has no {INDEX}: it is half-written; run the command that makes it again")
    return read_versioned(path, kind, VERSION, "remove the folder and make it again")


class CorruptRecord(Exception):
    """Says what is wrong with a record; `RecordFolder.read_as` adds where."""


class OpenShard:
    """A tar's file descriptor and where in it each member's bytes lie."""

    def __init__(self, path: Path) -> None:
        with tarfile.open(path, "r:") as tar:
            self.members = {member.name: (member.offset_data, member.size) for member in tar}
        self.file = path.open("rb")

    def bytes_of(self, member: str) -> bytes:
        if member not in self.members:
            raise CorruptRecord(f"{member} is missing")
        offset, size = self.members[member]
        # pread leaves the file position alone, which forked workers share.
        content = os.pread(self.file.fileno(), size, offset)
        if len(content) != size:
            raise CorruptRecord(f"{member} is cut off")
        return content


def _check_shard(path: Path, size: int, sha256: str | None) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; remove the folder and make it again")
    if path.stat().st_size != size:
        raise UserError(f"{path} has {path.stat().st_size} bytes, not {size}; remove the folder and make it again")
    if sha256 and sha256_of(path) != sha256:
        raise UserError(f"{path} has another sha256 than {INDEX} says; remove the folder and make it again")


def _encode(sample: Sample) -> dict[str, Any]:
    """The sample as TarWriter takes it: file contents by extension."""
    if not is_key(sample.key):
        raise UserError(f"{sample.key!r} cannot be a key: it may have no dot, no slash and no control character")
    image = _png(sample.image)
    meta = {"class": "unknown", "group": sample.key, **sample.meta, "sha256": hashlib.sha256(image).hexdigest()}
    record: dict[str, Any] = {"__key__": sample.key, "png": image}
    if sample.mask is not None:
        if sample.mask.shape != sample.image.shape or not np.isin(sample.mask, (0, 255)).all():
            raise ValueError(f"mask of {sample.key!r} must be of 0 and 255 and of the image's shape")
        record["mask.png"] = _png(sample.mask)
        meta["mask_sha256"] = hashlib.sha256(record["mask.png"]).hexdigest()
    else:
        meta.pop("mask_sha256", None)
    record["json"] = json.dumps(meta, sort_keys=True).encode()
    return record


def read_meta(shard: OpenShard, info: RecordInfo) -> dict[str, Any]:
    """The record's json."""
    meta = json.loads(shard.bytes_of(f"{info.key}.json"))
    if not isinstance(meta, dict) or (meta.get("class"), meta.get("group")) != (info.category, info.group):
        raise CorruptRecord(f"{info.key}.json is not what {INDEX} says")
    return meta


def read_verified(shard: OpenShard, member: str, sha256: str | None) -> bytes:
    content = shard.bytes_of(member)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CorruptRecord(f"{member} has another sha256 than was written with it")
    return content


def _decode(shard: OpenShard, info: RecordInfo) -> Sample:
    meta = read_meta(shard, info)
    image = _pixels(read_verified(shard, f"{info.key}.png", meta.get("sha256")))
    mask = None
    if info.labeled:
        mask = _pixels(read_verified(shard, f"{info.key}.mask.png", meta.get("mask_sha256")))
    return Sample(info.key, image, mask, meta)


def _png(array: np.ndarray) -> bytes:
    if array.dtype != np.uint8 or array.ndim != 2:
        raise ValueError(f"expected uint8 [H,W], got {array.dtype} {list(array.shape)}")
    buffer = io.BytesIO()
    # On ultrasound level 4 is three times as fast as Pillow's default of 6 and as small.
    Image.fromarray(array).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def _pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image)
