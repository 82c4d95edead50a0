"""List the files of a folder: follow links, leave out what file managers and notebooks put there."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from mgcc_dist.common.errors import UserError

# Synology's and Windows' thumbnails and trash, macOS' resource forks in zip files; hidden folders are left out anyway.
IGNORED_FOLDERS = {"@eadir", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "lost+found", "trash"}
IGNORED_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}
IGNORED_FILES |= {"corrections.jsonl", "scores.jsonl"}  # of mgcc serve, next to its images and masks


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield the files in `folder` and its subfolders, also linked ones, without hidden files and ignored folders.

    Links that lead nowhere are yielded too.

    Raises:
        UserError: a link leads to a folder that it lies in.
    """
    yield from _walk(folder, (folder.resolve(),))


def _walk(folder: Path, parents: tuple[Path, ...]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        name = path.name.lower()
        if name.startswith("."):
            continue
        if not path.is_dir():
            if name not in IGNORED_FILES:
                yield path
        elif name not in IGNORED_FOLDERS:
            target = path.resolve()
            if target in parents:
                raise UserError(f"{path}: links to {target}, a folder that it lies in. Remove the link.")
            yield from _walk(path, (*parents, target))


def describe_unread(files: Iterable[Path], root: Path) -> list[str]:
    """Return a note about the files that are not read: how many of each suffix, and the first; or an empty list."""
    unread = sorted(files)
    if not unread:
        return []
    suffixes = Counter(path.suffix.lower() or "without a suffix" for path in unread)
    counts = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
    first = readable_name(unread[0].relative_to(root).as_posix())
    return [f"{len(unread)} other files in {root} are not read: {counts} (the first is {first!r})"]


def readable_name(text: str) -> str:
    """Return a file name as text in Unicode normal form C; bytes that are not UTF-8 are taken as Windows-1252.

    macOS stores accents in form D, so that the same name differs between an image and its mask from elsewhere.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # Python keeps such bytes as surrogates
        text = os.fsencode(text).decode("cp1252", "replace")
    return unicodedata.normalize("NFC", text)
