"""Make an index.json for WebDataset tars that another program wrote, without changing or copying them."""

import hashlib
import json
import logging
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlunsplit

import numpy as np

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import create_folder, sha256_of, write_text
from mgcc_dist.common.progress import track
from mgcc_dist.data.images import BadFile, read_pixels, smallest_bits, to_8_bits
from mgcc_dist.data.masks import read_mask
from mgcc_dist.data.records import INDEX, LOCATION, ShardFolder, is_file_name, read_index, write_index
from mgcc_dist.data.remote import PIPE, fetch, is_url, join, shown, split_url
from mgcc_dist.data.sample import is_key

logger = logging.getLogger(__name__)

KIND = "index"
"""`made.reader` in index.json"""


@dataclass(frozen=True)
class Layout:
    """Which files of a record are what, by their extension: all that follows the first dot of the name.

    Of `images`, `masks` and `classes` the first that a record has is taken. `class_key` and `group_key` are keys of a
    json file. `label_values` are the values of mask files that are lesion, and `bits` those of 16-bit images.
    """

    images: tuple[str, ...]
    masks: tuple[str, ...]
    classes: tuple[str, ...]
    class_key: str
    group_key: str
    label_values: tuple[int, ...] = ()
    bits: int | None = None


@dataclass
class _Findings:
    """What the records read so far have in common."""

    bits: int = 0
    skipped: list[str] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    """of the json files"""


def index_shards(root: str, out: Path | None, name: str, layout: Layout, skip_bad: bool = False) -> ShardFolder:
    """Read all records once, and write index.json next to the shards or, with their location, to the folder `out`.

    Args:
        root: a folder; or tars by a brace expansion, `data/x-{000..123}.tar`, which may be a URL.
        skip_bad: leave out records that can't be used, instead of stopping at the first.

    Raises:
        UserError: there are no shards, a record can't be used, or another index.json exists.
    """
    location, names = list_shards(root)
    folder = out or Path(location)
    if out is None and is_url(location):
        raise UserError(f"--out: where to write {INDEX} for {shown(location)} is not given. Pass a folder.")
    findings = _Findings()
    shards = []
    for shard in track(names, "indexing shards", "shards"):
        with _local(location, shard) as path:
            records = list(_index_records(path, shown(join(location, shard)), layout, findings, skip_bad))
            entry = {"name": shard, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        shards.append(entry | {"records": records})
    if not any(shard["records"] for shard in shards):
        seen = ", ".join(sorted(findings.ignored)[:8])
        raise UserError(f"{shown(root)}: no record has an image. Its extensions are {seen}; choose some with --images.")
    if findings.ignored:
        logger.warning("shards: not read: files with the extensions %s", ", ".join(sorted(findings.ignored)))
    for option, key in (("--class-key", layout.class_key), ("--group-key", layout.group_key)):
        if findings.keys and key not in findings.keys:
            logger.warning(
                "shards: %s: no json file has the key %r. Keys: %s", option, key, ", ".join(sorted(findings.keys)[:8])
            )
    read = {"bits": layout.bits or findings.bits or None, "label_values": list(layout.label_values)}
    listing = json.dumps([shard["records"] for shard in shards], sort_keys=True)
    made = {"reader": KIND, "contents_sha256": hashlib.sha256(listing.encode()).hexdigest(), **read}
    if (folder / INDEX).exists():
        old = read_index(folder)
        if old.get("made") != made or [_content(shard) for shard in old["shards"]] != [*map(_content, shards)]:
            raise UserError(
                f"{folder / INDEX}: already exists, of other shards or with other options. Move it elsewhere, or "
                "choose another --out."
            )
    else:
        create_folder(folder)
        if is_url(location) or Path(location).resolve() != folder.resolve():
            write_text(folder / LOCATION, (location if is_url(location) else str(Path(location).resolve())) + "\n")
        write_index(folder, name, shards, made=made, read=read, skipped=len(findings.skipped))
    return ShardFolder.open(folder, verify=False)


def _content(shard: Mapping[str, Any]) -> tuple[str, str]:
    return shard["name"], shard["sha256"]


def list_shards(root: str) -> tuple[str, list[str]]:
    """Return the location of the shards, and their names.

    Raises:
        UserError: there are none, or they are in several folders.
    """
    from braceexpand import braceexpand

    if root.startswith(PIPE):
        raise UserError(f"{root}: shards behind a command can't be listed. Make their index where they are.")
    if not is_url(root) and Path(root).is_dir():
        names = sorted(path.name for path in Path(root).glob("*.tar"))
        if not names:
            raise UserError(f"{root}: has no .tar files. Pass the folder of the shards.")
        if wrong := [name for name in names if not is_file_name(name)]:
            raise UserError(f"{root}: {wrong[0]!r} can't be the name of a shard. Rename it without a backslash.")
        return root, names
    try:
        paths = list(braceexpand(root))
    except ValueError as error:
        raise UserError(f"{root}: has unbalanced braces. Write it as x-{{000..123}}.tar.") from error
    found = [_split_name(path) for path in paths]
    if root == paths[0] and not is_url(root) and not Path(root).exists():
        raise UserError(f"{root}: does not exist. Pass a folder, or shards as x-{{000..123}}.tar.")
    if others := [name for _, name in found if not name.endswith(".tar")]:
        raise UserError(f"{root}: {others[0]!r} is not a .tar file. Pass a folder, or shards as x-{{000..123}}.tar.")
    if len({location for location, _ in found}) > 1:
        raise UserError(f"{root}: names shards in several folders. Make an index for each.")
    return found[0][0], [name for _, name in found]


def _split_name(path: str) -> tuple[str, str]:
    """Split a path or URL into a location and the name of a file there."""
    if not is_url(path):
        return str(Path(path).parent), Path(path).name
    parts = split_url(path)
    folder, _, name = parts.path.rpartition("/")
    return urlunsplit(parts._replace(path=folder)), name


@contextmanager
def _local(location: str, name: str) -> Iterator[Path]:
    """Yield a local path of a shard; one at a URL is copied, and deleted at the end."""
    if not is_url(location):
        yield Path(location) / name
        return
    with tempfile.TemporaryDirectory() as folder:
        fetch(join(location, name), Path(folder) / name)
        yield Path(folder) / name


def _index_records(
    path: Path, shard: str, layout: Layout, findings: _Findings, skip_bad: bool
) -> Iterator[dict[str, Any]]:
    """Yield the entries of a shard for index.json."""
    try:
        with tarfile.open(path, "r:") as tar:
            for key, files in _group(tar).items():
                try:
                    yield from _index_record(tar, key, files, layout, findings)
                except BadFile as bad:
                    if not skip_bad:
                        raise UserError(f"{shard}: {bad}. Correct it, or pass --skip-bad.") from bad
                    findings.skipped.append(key)
                    logger.warning("shards: skipped: %s: %s", shard, bad)
    except OSError as error:
        raise UserError(f"{shard}: can't be read ({error.strerror or error}). Check the path.") from error
    except tarfile.TarError as error:
        raise UserError(f"{shard}: is not an uncompressed tar file ({error}). Only those can be indexed.") from error


def _group(tar: tarfile.TarFile) -> Mapping[str, dict[str, tarfile.TarInfo]]:
    """Return the files of each record by extension, as WebDataset groups them."""
    records: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        base, _, extension = name.partition(".")
        if member.isfile() and base and extension:
            key = f"{folder}/{base}" if folder else base
            records.setdefault(key, {})[extension.lower()] = member
    return records


def _index_record(
    tar: tarfile.TarFile, name: str, files: Mapping[str, tarfile.TarInfo], layout: Layout, findings: _Findings
) -> Iterator[dict[str, Any]]:
    """Yield the entry of a record, or nothing if it has neither an image nor a mask.

    Raises:
        BadFile: it can't be used.
    """
    image, mask, label = (
        next((extension for extension in wanted if extension in files), "")
        for wanted in (layout.images, layout.masks, layout.classes)
    )
    findings.ignored.update(files.keys() - {*layout.images, *layout.masks, *layout.classes, "json"})
    key = re.sub(r"[./]", "_", name)  # dots: of a folder
    if not image:
        if mask:
            raise BadFile(Path(files[mask].name), "has no image")
        return
    if not is_key(key):
        raise BadFile(Path(files[image].name), "its name has characters that cannot be printed")
    contents = {extension: _read(tar, files[extension]) for extension in {image, mask, label, "json"} & files.keys()}
    pixels = read_pixels(Path(files[image].name), contents[image])
    if pixels.dtype == np.uint16:
        findings.bits = max(findings.bits, smallest_bits(pixels))
    used = [image]
    shape = _shape(Path(files[image].name), pixels, layout.bits)
    if mask:
        used.append(mask)
        of_mask = read_mask(Path(files[mask].name), layout.label_values, contents[mask])[0].shape
        if of_mask != shape:
            raise BadFile(
                Path(files[mask].name), f"is {of_mask[1]}x{of_mask[0]} but its image is {shape[1]}x{shape[0]}"
            )
    facts = _read_json(Path(files["json"].name), contents["json"]) if "json" in files else {}
    findings.keys.update(facts)
    category = facts.get(layout.class_key) if label == "json" else None
    if label and label != "json":
        category = contents[label].decode("utf-8", "replace").strip()
    group = facts.get(layout.group_key)
    for what, value in (("class", category), ("group", group)):
        if isinstance(value, (dict, list)) or not str(value).isprintable():
            raise BadFile(Path(files[label or "json"].name), f"its {what} is {value!r}, not a word or number")
    yield {
        "key": key,
        "class": "unknown" if category in (None, "") else str(category),
        "labeled": bool(mask),
        "group": key if group in (None, "") else str(group),
        "files": [[files[each].name, hashlib.sha256(contents[each]).hexdigest()] for each in used],
    }


def _shape(name: Path, pixels: np.ndarray, bits: int | None) -> tuple[int, ...]:
    try:
        return to_8_bits(pixels, bits).shape
    except ValueError as error:
        raise BadFile(name, str(error)) from error


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read()


def _read_json(name: Path, content: bytes) -> Mapping[str, Any]:
    try:
        facts = json.loads(content)
    except ValueError as error:
        raise BadFile(name, f"is not JSON ({error})") from error
    return facts if isinstance(facts, dict) else {}
