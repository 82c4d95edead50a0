"""Read files at URLs: http(s), everything that fsspec opens (s3, gs, ...) and the output of a shell command (pipe).

A location names a folder: a path, a URL such as https://host/data or s3://bucket/data, or `pipe:COMMAND`, whose `{}`
stands for the name of the file. A pipe runs a shell command, so it is taken from the user only, never from a file.

HTTP is read by urllib, because webdataset's opener runs curl, which has no timeout for a server that stalls, hides the
HTTP status and is not installed everywhere. All others go through webdataset's opener or fsspec.
"""

import hashlib
import http.client
import logging
import os
import re
import select
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit

from mgcc_dist.common.errors import DISK_FULL, UserError, reason_of
from mgcc_dist.common.files import sha256_of

logger = logging.getLogger(__name__)

HTTP = ("http", "https")
PIPE = "pipe:"
PLACEHOLDER = "{}"
ATTEMPTS = 5
TIMEOUT = 30.0  # seconds without a byte
DELAY = 1.0  # seconds before the second attempt; doubles with each further one
MIN_SPEED = 20_000  # bytes per second: a server that is slower over a full shard counts as stalled
CHUNK = 1 << 20
TRY_AGAIN = (408, 425, 429)  # HTTP statuses below 500 that may be different next time


def is_url(text: object) -> TypeGuard[str]:
    """Return whether a location is a URL or a pipe, and not a path."""
    return isinstance(text, str) and bool(re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://|pipe:", text))


def join(location: str, name: str) -> str:
    """Return the URL, or the path, of the file `name` at a location.

    Raises:
        UserError: it is not a URL that can be read, or the command of a pipe does not say where the name belongs.
    """
    if location.startswith(PIPE):
        if PLACEHOLDER not in location:
            raise UserError(
                f"{location}: reads one file only. Write {PLACEHOLDER} where the name of the file belongs: "
                f"'pipe:ssh host cat /data/{PLACEHOLDER}'."
            )
        return location.replace(PLACEHOLDER, shlex.quote(name))
    if not is_url(location):
        return str(Path(location) / name)
    parts = split_url(location)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def split_url(url: str) -> SplitResult:
    """Split a URL into its parts.

    Raises:
        UserError: it has no host where one is needed, or a host or port that can't exist.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme in HTTP:
            if not parts.hostname:
                raise ValueError("no host given")  # reported like the errors of urlsplit
            if re.search(r"\s", parts.netloc):
                raise ValueError("its host has a space")
            _ = parts.port  # raises ValueError
    except ValueError as error:
        public = re.sub(r"//[^/@]*@", "//", url.partition("?")[0])  # as `shown`, which needs a valid URL
        raise UserError(f"{public}: is not a valid URL ({error}). Write it as https://host/folder.") from error
    return parts


def shown(url: str) -> str:
    """Return a URL for messages: without a password, and without its query, which may hold a signature."""
    if url.startswith(PIPE) or not is_url(url):
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def fetch(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Read a URL, or a local file, into `path`; try again after errors that may pass.

    Raises:
        UserError: it can't be read, or its content has another size or sha256.
    """

    def attempt() -> None:
        digest = hashlib.sha256()
        with path.open("r+b" if path.exists() else "wb") as file:
            for chunk in _chunks(url, size):
                digest.update(chunk)
                file.write(chunk)
            file.truncate()
        if sha256 and digest.hexdigest() != sha256:
            raise _changed(url, f"its sha256 is {digest.hexdigest()[:12]}, expected {sha256[:12]}")

    _retry(url, attempt)


def fetch_bytes(url: str) -> bytes:
    """Return the content of a URL.

    Raises:
        UserError: it can't be read.
    """
    return _retry(url, lambda: b"".join(_chunks(url)))


@lru_cache(maxsize=32)
def fetch_index(url: str) -> bytes:
    """Return the content of an index.json at a URL; in one process it is always the same."""
    return fetch_bytes(url)


def hash_file(file: Path | str) -> str:
    """Return the sha256 of a file, or of an index.json at a URL."""
    return sha256_of(file) if isinstance(file, Path) else hashlib.sha256(fetch_index(file)).hexdigest()


def _retry(url: str, attempt: Callable[[], Any]) -> Any:
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            reason, final = _describe(error)
            if final or number == ATTEMPTS - 1:
                attempts = "" if final else f"{ATTEMPTS} attempts, the last error: "
                raise UserError(
                    f"{shown(url)}: can't be read ({attempts}{reason}). Check the address, the server and the network."
                ) from error
            logger.warning("%s: %s. Trying again in %g s.", shown(url), reason, DELAY * 2**number)
            time.sleep(DELAY * 2**number)
    raise AssertionError("unreachable")


def _describe(error: Exception) -> tuple[str, bool]:
    """Return an error in words, and whether it is sure to come again."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}", error.code < 500 and error.code not in TRY_AGAIN
    if isinstance(error, urllib.error.URLError):
        return str(error.reason), False
    if isinstance(error, TimeoutError):
        return str(error) if "bytes" in str(error) else f"no answer for {TIMEOUT:g} s", False
    return str(error) or type(error).__name__, isinstance(error, (FileNotFoundError, PermissionError))


def _chunks(url: str, size: int | None = None) -> Iterator[bytes]:
    """Yield the content of a URL.

    Raises:
        OSError, HTTPException: it can't be opened, or ends early; another attempt may succeed.
        UserError: it has another size.
    """
    received = 0
    began = time.monotonic()
    read, close, announced = _open(url)
    with ExitStack() as stack:
        stack.callback(close)
        while chunk := read():
            received += len(chunk)
            if size is not None and received > size:
                raise _changed(url, f"it has more than {size} bytes")
            seconds = time.monotonic() - began
            if seconds > TIMEOUT + received / MIN_SPEED:
                raise TimeoutError(f"only {received} bytes in {seconds:.0f} s")
            yield chunk
    expected = size if announced is None else announced
    if expected is not None and received < expected:
        raise ConnectionError(f"the content ended after {received} of {expected} bytes")
    if size is not None and received != size:
        raise _changed(url, f"it has {received} bytes, expected {size}")


def _changed(url: str, how: str) -> UserError:
    return UserError(
        f"{shown(url)}: not the file that the index was made of ({how}). Restore it, or make a new index and start a "
        "new run."
    )


def _open(url: str) -> tuple[Callable[[], bytes], Callable[[], None], int | None]:
    """Return a function that reads the next bytes, one that closes, and the announced size if there is one."""
    if not is_url(url):
        file = Path(url).open("rb")  # noqa: SIM115 # the caller closes it
        return (lambda: file.read(CHUNK)), file.close, None
    if url.startswith(PIPE):
        return _open_pipe(url)
    if (parts := urlsplit(url)).scheme in HTTP:
        path = quote(parts.path, safe="/%:@!$&'()*+,;=~")  # spaces and letters outside ASCII; the rest may be quoted
        answer = urllib.request.urlopen(urlunsplit(parts._replace(path=path)), timeout=TIMEOUT)
        length = answer.headers.get("Content-Length", "")
        return (lambda: answer.read1(CHUNK)), answer.close, int(length) if length.isdecimal() else None
    with _errors_of_fsspec(url):
        stream = _open_by_fsspec(url)

    def read() -> bytes:
        with _errors_of_fsspec(url):
            return stream.read(CHUNK)

    return read, stream.close, getattr(stream, "size", None)


@contextmanager
def _errors_of_fsspec(url: str) -> Iterator[None]:
    """Raise errors that only the package behind a URL knows, such as botocore's, as OSError."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        raise ConnectionError(f"{type(error).__name__}: {reason_of(error)}") from error


def _open_pipe(url: str) -> tuple[Callable[[], bytes], Callable[[], None], None]:
    from webdataset.gopen import gopen

    try:
        pipe = gopen(url, bufsize=0)
    except ValueError as error:  # WebDataset's security mode
        raise UserError(f"{url}: is refused ({error})") from error

    def read() -> bytes:
        if not select.select([pipe.stream], [], [], TIMEOUT)[0]:
            pipe.proc.kill()
            raise TimeoutError
        content: bytes = os.read(pipe.stream.fileno(), CHUNK)
        if not content and pipe.proc.wait(TIMEOUT):
            raise OSError(f"the command ended with exit code {pipe.proc.returncode}")
        return content

    def close() -> None:
        pipe.ignore_errors = True  # `read` has reported them
        pipe.stream.close()
        pipe.proc.kill()
        pipe.proc.wait()

    return read, close, None


def _open_by_fsspec(url: str) -> Any:
    import fsspec

    try:
        return fsspec.open(url, "rb", block_size=CHUNK).open()
    except ImportError as error:
        remedy = "Run `pip install 'mgcc-dist[s3]'`." if url.startswith("s3:") else "Install it."
        raise UserError(f"{shown(url)}: the package that reads such a URL is missing ({error}). {remedy}") from error
    except ValueError as error:  # an unknown protocol
        raise UserError(f"{shown(url)}: can't be read ({error}). Use https://, s3:// or pipe:.") from error
