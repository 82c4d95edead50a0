"""The shard format: WebDataset tars of grey images and masks, plus an index.json that describes the folder.

A record is `{key}.png` (8-bit grey), `{key}.mask.png` (8-bit, 0 or 255; absent when unlabeled) and `{key}.json` (the
`meta` of its Sample). Any `webdataset` reader can read it. index.json lists each shard with its size and sha256, and
each record with its class and split group. It is written last, so a folder without it is incomplete. Shards are
byte-reproducible: the same samples give the same file (with the same Pillow, whose zlib compresses the PNGs).
"""

import hashlib
import io
import json
import tarfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from PIL import Image

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import check_versioned, read_versioned, replacing, sha256_of, write_json
from mgcc_dist.data.foreign_records import decode_foreign
from mgcc_dist.data.remote import PIPE, fetch_index, hash_file, is_url, join, shown
from mgcc_dist.data.sample import RecordInfo, Sample, is_key
from mgcc_dist.data.shard_cache import ShardCache, default_cache
from mgcc_dist.data.storage import REMEDY, CorruptRecord, OpenShard, Storage, open_storage

if TYPE_CHECKING:
    from torch.utils.data import Dataset
else:  # a map-style dataset needs no base class at run time, and importing torch takes over a second
    Dataset = Generic

FORMAT = "mgcc-dist shards"
VERSION = 1
INDEX = "index.json"
REQUEST = "request.json"
"""next to INDEX where samples are generated: what was asked for"""
LOCATION = "location.txt"
"""next to INDEX where the shards are elsewhere: the URL or path of their folder"""

Record = TypeVar("Record")


def write_shard(path: Path, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write one tar atomically and return its entry for `write_index`.

    A missing "class" in `meta` becomes "unknown"; a missing "group" becomes a group with this record only.

    Raises:
        UserError: a key is not a valid WebDataset key.
        ValueError: an array's shape, dtype or values differ from what `Sample` documents.
    """
    return write_records(path, map(_encode, samples))


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Write one tar of TarWriter records atomically and return its entry for `write_index`.

    A record maps extensions to file contents and has a `__key__`; its "json" has "class" and "group".
    """
    from webdataset.writer import TarWriter  # here, because it imports torch

    entries = []
    with (
        replacing(path) as scratch,
        scratch.open("wb") as file,
        TarWriter(file, encoder=False, mtime=0, user="mgcc-dist", group="mgcc-dist") as tar,
    ):
        for record in records:
            tar.write(record)
            meta = json.loads(record["json"])
            labeled = "mask.png" in record
            entry = {"key": record["__key__"], "class": meta["class"], "labeled": labeled, "group": meta["group"]}
            entries.append(entry | ({"fold": meta["fold"]} if "fold" in meta else {}))
    return _shard_entry(path, entries)


def copy_records(source: Path, path: Path, records: Collection[dict[str, Any]]) -> dict[str, Any]:
    """Copy some records of the shard `source`, unchanged, to the shard `path`; return its entry for `write_index`.

    `records` are their entries in index.json.
    """
    keys = {record["key"] for record in records}
    with replacing(path) as scratch, tarfile.open(source, "r:") as old, tarfile.open(scratch, "w") as new:
        for member in old:
            if member.name.partition(".")[0] in keys:
                new.addfile(member, old.extractfile(member))
    return _shard_entry(path, list(records))


def _shard_entry(path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path), "records": records}


def write_index(folder: Path, dataset: str, shards: list[dict[str, Any]], kind: str = FORMAT, **extra: Any) -> None:
    """Write index.json, which marks the folder as complete; `extra` keys are stored with the others.

    Raises:
        UserError: two records have the same key.
    """
    records = [record for shard in shards for record in shard["records"]]
    for key, times in Counter(record["key"] for record in records).items():
        if times > 1:
            raise UserError(f"{folder}: {times} records have the key {key!r}. Rename their source files.")
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


class RecordFolder(Dataset[Record]):
    """Map-style dataset over a complete folder of shards; subclasses decode a record.

    Items are in the order of index.json. Each process opens the tar files on first access, so an instance can be
    pickled or forked to DataLoader workers.
    """

    FORMAT: ClassVar[str]

    def __init__(self, source: Path | str, index: dict[str, Any], storage: Storage) -> None:
        self.source = source
        self.folder = shown(source) if is_url(source) else Path(source)
        """for messages: path, or URL without its query"""
        self.index = index
        self.storage = storage
        self.dataset: str = index["dataset"]
        self.records = [
            RecordInfo(
                record["key"],
                shard["name"],
                record["labeled"],
                record["class"],
                record["group"],
                record.get("fold", ""),
                tuple(map(tuple, record.get("files", ()))),
            )
            for shard in index["shards"]
            for record in shard["records"]
        ]
        self._index_by_key = {record.key: i for i, record in enumerate(self.records)}
        self._open_shards: dict[str, OpenShard] = {}

    @classmethod
    def open(cls, source: Path | str, verify: bool = True, cache: ShardCache | None = None) -> Self:
        """Read index.json and check the shards it lists: their sizes and, with `verify`, their sha256.

        Args:
            source: folder, or its location (data/remote.py).
            cache: where shards are copied to before they are read; shards at URLs always are. A copy is verified.

        Raises:
            UserError: the folder does not exist or is incomplete, index.json is unreadable, or a shard is missing or
                has different content.
        """
        index = read_index(source, cls.FORMAT)
        try:
            _check_index(index)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{_shown_index(source)}: damaged ({error!r}). {REMEDY}") from error
        location = _location(source)
        if is_url(location):
            cache = cache or default_cache()
        return cls(source, index, open_storage(location, index["shards"], verify, cache))

    @abstractmethod
    def decode(self, shard: "OpenShard", info: RecordInfo) -> Record:
        """Decode one record. May raise CorruptRecord, OSError or ValueError."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        """Read a record.

        Raises:
            UserError: the record is missing, truncated or corrupt; the message names the shard and the key.
        """
        info = self.records[index]
        try:
            if info.shard not in self._open_shards:
                self._open_shards[info.shard] = OpenShard(partial(self.storage.open, info.shard))
            return self.decode(self._open_shards[info.shard], info)
        except (CorruptRecord, OSError, tarfile.TarError, ValueError) as error:
            path = self.storage.describe(info.shard)
            raise UserError(f"{path}: record {info.key!r} is corrupt: {error}. {REMEDY}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_shards": {}}

    def keys(self) -> list[str]:
        return [record.key for record in self.records]

    @property
    def index_sha256(self) -> str:
        return hash_file(index_file(self.source))

    @property
    def content_sha256(self) -> str:
        """The sha256 of what identifies the data set: the files it was converted from, and how these were read.

        It does not depend on the size and number of the shards. Folders that no reader wrote are identified by their
        index.json.
        """
        made = {key: value for key, value in self.index.get("made", {}).items() if key not in ("size", "per_shard")}
        return hashlib.sha256(json.dumps(made or self.index, sort_keys=True).encode()).hexdigest()

    def index_of(self, key: str) -> int:
        """Return the index of the record `key`.

        Raises:
            UserError: there is no such record.
        """
        if key not in self._index_by_key:
            raise UserError(f"{self.folder}: no record {key!r}. Check that the split belongs to this data set.")
        return self._index_by_key[key]


class ShardFolder(RecordFolder[Sample]):
    """Map-style dataset of images and masks; checks each file's sha256 on reading."""

    FORMAT = FORMAT

    def decode(self, shard: "OpenShard", info: RecordInfo) -> Sample:
        if info.files:
            return decode_foreign(shard, info, self.dataset, self.index["read"])
        meta = read_meta(shard, info)
        image = _decode_png(shard.read_verified(f"{info.key}.png", meta.get("sha256")))
        mask = None
        if info.labeled:
            mask = _decode_png(shard.read_verified(f"{info.key}.mask.png", meta.get("mask_sha256")))
        return Sample(info.key, image, mask, meta)


def read_index(source: Path | str, kind: str = FORMAT) -> dict[str, Any]:
    """Return the content of index.json.

    Raises:
        UserError: the folder does not exist or is incomplete, or index.json is not JSON, has another format or version,
            or names a file outside the folder.
    """
    path = _shown_index(source)
    if is_url(source):
        try:
            content = json.loads(fetch_index(join(source, INDEX)))
        except ValueError as error:
            raise UserError(f"{path}: is not JSON ({error}). Check the address of the shard folder.") from error
        index = check_versioned(content, path, kind, VERSION, REMEDY)
    else:
        _require_index(Path(source))
        index = read_versioned(Path(source) / INDEX, kind, VERSION, REMEDY)
    shards = index.get("shards")
    for shard in shards if isinstance(shards, list) else ():
        name = shard.get("name") if isinstance(shard, dict) else None
        if not is_file_name(name):
            raise UserError(f"{path}: {name!r} is not a plain file name, so it could be outside the folder. {REMEDY}")
    return index


def index_file(source: Path | str) -> Path | str:
    """Return the path, or the URL, of the index.json of a shard folder."""
    return join(source, INDEX) if is_url(source) else Path(source) / INDEX


def _shown_index(source: Path | str) -> str:
    return shown(str(index_file(source)))


def _require_index(folder: Path) -> None:
    """Raise UserError if there is no index.json in `folder`."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file. Pass the shard folder.")
    if not folder.is_dir():
        raise UserError(
            f"{folder}: does not exist. Create it with `mgcc shards` (demo images: `mgcc shards phantom`, all of the "
            "demo: `make demo`; synthetic images: `mgcc ldm`)."
        )
    if not (folder / INDEX).is_file():
        others = any(not child.name.startswith(".") for child in folder.iterdir())
        if others and not any(folder.glob("*.tar")):
            raise UserError(f"{folder}: not a shard folder, it has no {INDEX}. Convert its images with `mgcc shards`.")
        raise UserError(
            f"{folder}: incomplete, it has no {INDEX}. Rerun the command that creates it (other programs' WebDataset "
            "shards: `mgcc shards index`)."
        )


def _location(source: Path | str) -> str:
    """Return where the shards are: next to index.json, or where location.txt says.

    Raises:
        UserError: location.txt names a command, or no folder.
    """
    path = Path(source) / LOCATION
    if (is_url(source)) or not path.is_file():
        return str(source)
    location = path.read_text(encoding="utf-8", errors="replace").strip()
    if not is_url(location) and not (location and Path(source, location).is_dir()):
        raise UserError(f"{path}: {location!r} is not a folder or URL. Write there where the shards of {INDEX} are.")
    if location.startswith(PIPE):  # it would run a command that whoever wrote the file chose
        raise UserError(f"{path}: names a command ({PIPE}), and these are taken from data.shards only. Pass it there.")
    return location if is_url(location) else str(Path(source, location))


def _check_index(index: dict[str, Any]) -> None:
    """Check the types in index.json, and its totals, which an edited record no longer adds up to.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: something is missing or wrong.
    """
    records = [record for shard in index["shards"] for record in shard["records"]]
    texts = [index["dataset"], *(shard["sha256"] for shard in index["shards"])]
    texts += [record[name] for record in records for name in ("key", "class", "group")]
    texts += [record.get("fold", "") for record in records]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{wrong[0]!r} is not a text")
    if wrong := [record["key"] for record in records if not isinstance(record["labeled"], bool)]:
        raise TypeError(f"labeled of {wrong[0]!r} is not true or false")
    foreign = [record for record in records if "files" in record]
    if foreign and not (isinstance(index["read"], dict) and len(foreign) == len(records)):
        raise TypeError("read is missing")
    if wrong := [record["key"] for record in foreign if len(record["files"]) != 1 + record["labeled"]]:
        raise ValueError(f"files of {wrong[0]!r} are not an image and, if it is labeled, a mask")
    for name, sha256 in (file for record in foreign for file in record["files"]):
        if not isinstance(name, str) or not isinstance(sha256, str):
            raise TypeError(f"{name!r}, {sha256!r} is not a name and a sha256")
    if repeated := [key for key, times in Counter(record["key"] for record in records).items() if times > 1]:
        raise ValueError(f"two records have the key {repeated[0]!r}")
    totals = {
        "records": len(records),
        "labeled": sum(record["labeled"] for record in records),
        "classes": dict(Counter(record["class"] for record in records)),
    }
    if wrong := [name for name, total in totals.items() if index[name] != total]:
        raise ValueError(f"{wrong[0]} does not match the list of records")


def is_file_name(name: object) -> bool:
    """Return whether `name` is a plain file name, which can't lead out of its folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def read_meta(shard: OpenShard, info: RecordInfo) -> dict[str, Any]:
    """Read a record's json and check it against index.json."""
    meta = json.loads(shard.bytes_of(f"{info.key}.json"))
    if not isinstance(meta, dict) or (meta.get("class"), meta.get("group")) != (info.category, info.group):
        raise CorruptRecord(f"{info.key}.json does not match {INDEX}")
    return meta


def _encode(sample: Sample) -> dict[str, Any]:
    """Convert a sample to a TarWriter record: file contents by extension."""
    if not is_key(sample.key):
        raise UserError(f"{sample.key!r}: not a valid key. Keys have no dots, slashes or control characters.")
    image = _encode_png(sample.image)
    meta = {"class": "unknown", "group": sample.key, **sample.meta, "sha256": hashlib.sha256(image).hexdigest()}
    record: dict[str, Any] = {"__key__": sample.key, "png": image}
    if sample.mask is not None:
        if sample.mask.shape != sample.image.shape or not np.isin(sample.mask, (0, 255)).all():
            raise ValueError(f"mask of {sample.key!r} must have the image's shape and only values 0 and 255")
        record["mask.png"] = _encode_png(sample.mask)
        meta["mask_sha256"] = hashlib.sha256(record["mask.png"]).hexdigest()
    else:
        meta.pop("mask_sha256", None)
    record["json"] = json.dumps(meta, sort_keys=True).encode()
    return record


def _encode_png(array: np.ndarray) -> bytes:
    if array.dtype != np.uint8 or array.ndim != 2:
        raise ValueError(f"expected uint8 [H,W], got {array.dtype} {list(array.shape)}")
    buffer = io.BytesIO()
    # On ultrasound, level 4 is three times as fast as Pillow's default of 6 and compresses as well.
    Image.fromarray(array).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def _decode_png(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        return np.array(image)
