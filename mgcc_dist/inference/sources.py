"""The images and cines that `mgcc predict` reads: listed from files, folders or standard input, and named.

A DICOM file is named after its SOP Instance UID, or its sha256 if it has none, because paths often hold the patient's
name; `--keep-identifiers` names it after its path, like other images.
"""

import hashlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.common.words import counted
from mgcc_dist.data.dicom import DICOM_SUFFIXES, DicomHeader, NoImage, is_dicom, read_header
from mgcc_dist.data.file_listing import describe_unread, walk_files
from mgcc_dist.data.images import SUFFIXES, BadFile, find_unreadable
from mgcc_dist.inference.output_folder import CONTENTS, WRITTEN

logger = logging.getLogger("mgcc_dist.predict")

STDIN = "-"
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".wmv", ".mpg", ".mpeg", ".m4v", ".webm")
VIDEO = "is a video. Save its frames as images first, for example with `ffmpeg -i VIDEO frames/%04d.png`."


@dataclass(frozen=True)
class Source:
    """One file to segment."""

    path: Path
    file: str
    """its name in tables and messages: a path below the common folder, or a UID"""
    stem: str
    """what its outputs are called, below the folder of their kind"""
    dicom: DicomHeader | None = None
    problem: str = ""
    """why it can't be read"""
    private: bool = False
    """whether its path must not appear in outputs"""

    @property
    def frames(self) -> int:
        return self.dicom.frames if self.dicom else 1

    def name(self, frame: int) -> str:
        """The name of a frame's outputs without suffix; frames of a cine count from 1, as in DICOM."""
        return f"{self.stem}/{frame + 1:04d}" if self.frames > 1 else self.stem

    def sha256(self) -> str:
        """The sha256 of the file, or why it can't be read."""
        bad = find_unreadable(self.path)
        return bad.reason if bad else sha256_of(self.path)


def read_inputs(words: Sequence[str]) -> list[Path]:
    """The files and folders that `--images` names; `-` stands for those on standard input, one per line.

    Raises:
        UserError: standard input names none.
    """
    if tuple(words) != (STDIN,):
        return [Path(word) for word in words]
    paths = [Path(os.fsdecode(line)) for line in sys.stdin.buffer.read().splitlines() if line.strip()]
    if not paths:
        raise UserError("--images -: standard input lists no files. Give one path per line.")
    return paths


def list_sources(
    paths: Sequence[Path], out: Path, keep_identifiers: bool = False, from_list: bool = False
) -> list[Source]:
    """List the images of files and folders.

    Args:
        from_list: `paths` are a list that a program wrote: files of other kinds are left out as in a folder, and files
            that do not exist are unreadable ones.

    Raises:
        UserError: there are none, one input does not exist, `out` and a folder contain each other, so that masks could
            pass for images, or two images would share an output.
    """
    for path in paths:
        _check_input(path, out, from_list)
    root = _common_folder(paths)
    folders = [path for path in paths if path.is_dir()]
    listed = {file: path for path in folders for file in walk_files(path)}
    found = {file: is_dicom(file) for file in listed if file.suffix.lower() not in SUFFIXES}
    unread = [file for file, dicom in found.items() if not dicom]
    named = {path: is_dicom(path) for path in paths if path not in folders}
    if from_list:
        strange = (path for path, dicom in named.items() if not dicom and path.suffix.lower() not in SUFFIXES)
        unread += [path for path in strange if not find_unreadable(path)]

    files = sorted({*listed, *named} - set(unread))
    sources: list[Source] = []
    for file in files:
        try:
            sources.append(_source(file, root, found.get(file) or named.get(file, False), keep_identifiers))
        except NoImage as other:
            if file in named and not from_list:
                raise UserError(str(other)) from other
            unread.append(file)
    private = any(source.private for source in sources)
    for folder in folders:
        others = [file for file in unread if listed.get(file) == folder]
        for note in describe_unread(others, folder):
            logger.warning("predict: %s", f"{len(others)} other files are not read" if private else note)
    if others_listed := sum(file in named for file in unread):
        logger.warning("predict: neither image nor DICOM image: %s of the list", counted(others_listed, "file"))
    if not sources:
        kinds = ", ".join((*SUFFIXES, ".dcm"))
        raise UserError(f"--images {' '.join(map(str, paths))}: no images ({kinds}) in the folder or its subfolders")
    return _unique(sources)


def output_names(files: Sequence[Path]) -> dict[Path, str]:
    """The name of each image's outputs, without suffix: `a`; with both a.jpg and a.bmp, `a.jpg` and `a.bmp`.

    Raises:
        UserError: two images would still share a name.
    """
    suffixes = (*SUFFIXES, *DICOM_SUFFIXES)  # what follows a dot in a UID is none
    bare = {file: file.with_suffix("") if file.suffix.lower() in suffixes else file for file in files}
    times = Counter(bare.values())
    names = {file: (bare[file] if times[bare[file]] == 1 else file).as_posix() for file in files}
    owners: dict[str, Path] = {}
    for file, name in names.items():
        if name in owners:
            raise UserError(
                f"the masks of {owners[name]} and {file} would both be {name}.png. Rename one of the images."
            )
        owners[name] = file
    return names


def describe_inputs(paths: Sequence[Path], private: bool) -> str | list[str]:
    """What predict.json says about the inputs: their absolute paths, or with `private` only a hash of these."""
    names = [os.path.realpath(path) for path in paths]
    if private:
        return f"sha256:{hashlib.sha256(os.fsencode(chr(10).join(names))).hexdigest()}"
    return names[0] if len(names) == 1 else names


def _check_input(path: Path, out: Path, from_list: bool) -> None:
    if not path.is_dir():
        if from_list:
            return
        if not (path.is_file() or path.is_symlink()):
            raise UserError(f"--images {path}: no such file or folder. Give the images, or the folder that holds them.")
        if path.suffix.lower() in VIDEO_SUFFIXES:
            raise UserError(f"--images {path}: {VIDEO}")
        if path.suffix.lower() not in SUFFIXES and not is_dicom(path) and not find_unreadable(path):
            raise UserError(f"--images {path}: neither an image ({', '.join(SUFFIXES)}) nor DICOM")
        return
    images, outputs = path.resolve(), out.resolve()
    if outputs.is_relative_to(images):
        raise UserError(f"--out {out}: is in --images {path}. Choose another --out.")
    if images.is_relative_to(outputs):
        raise UserError(f"--out {out}: contains --images {path}. Choose another --out.")
    for predicted in (path, path.resolve().parent):
        if (predicted / CONTENTS).is_file() and (predicted / WRITTEN).is_file():
            raise UserError(f"--images {path}: {predicted} holds predictions. Give the folder of the images.")


def _common_folder(paths: Iterable[Path]) -> Path:
    folders = [_normalized(path) if path.is_dir() else _normalized(path).parent for path in paths]
    return Path(os.path.commonpath(folders))


def _normalized(path: Path) -> Path:
    """The absolute path without `..`, with which outputs would leave their folder."""
    return Path(os.path.normpath(path.absolute()))


def _source(path: Path, root: Path, dicom: bool, keep_identifiers: bool) -> Source:
    """Name a source; `stem` of one named after its path is set when all are known."""
    file = _normalized(path).relative_to(root).as_posix()
    if not dicom and path.suffix.lower() in SUFFIXES:
        return Source(path, file, "")
    try:
        header, problem = read_header(path), ""
    except NoImage:
        raise
    except BadFile as bad:
        header, problem = None, bad.reason
    if keep_identifiers:
        return Source(path, file, "", header, problem)
    key = header.uid if header and header.uid else _hashed(path)
    return Source(path, key, key, header, problem, private=True)


def _hashed(path: Path) -> str:
    bad = find_unreadable(path)
    content = hashlib.sha256(os.fsencode(path)).hexdigest() if bad else sha256_of(path)
    return f"sha256-{content}"


def _unique(sources: list[Source]) -> list[Source]:
    """Complete the stems, and leave out copies of a DICOM file.

    Raises:
        UserError: two sources would share an output.
    """
    by_path = [source for source in sources if not source.stem]
    stems = output_names([Path(source.file) for source in by_path])
    kept: dict[str, Source] = {}
    copies = 0
    for source in sources:
        source = source if source.stem else replace(source, stem=stems[Path(source.file)])
        if source.file in kept:
            if source.sha256() == kept[source.file].sha256():
                copies += 1
                continue
            other = f"{source.file}-{source.sha256()[:8]}"
            source = replace(source, file=other, stem=other)
        kept[source.file] = source
    if copies:
        logger.warning("predict: left out %s of other DICOM files", counted(copies, "copy"))
    names = Counter(source.name(frame) for source in kept.values() for frame in range(source.frames))
    name, count = names.most_common(1)[0]
    if count > 1:
        raise UserError(f"{count} images would all have the output {name}. Rename one of them.")
    return list(kept.values())
