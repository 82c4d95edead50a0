"""What one start of `mgcc serve` knows: the queue, the files that were dropped on the page, and recent predictions.

Items are addressed by `q-INDEX` in the queue and `u-UPLOAD-INDEX` of a dropped file. Several tabs may use the same
session; methods may be called from any thread.
"""

import hashlib
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.data.dicom import DICOM_SUFFIXES
from mgcc_dist.data.dicom_regions import Spacing
from mgcc_dist.data.images import BadFile
from mgcc_dist.serving.corrections import Corrections
from mgcc_dist.serving.items import Item, items_of, open_upload, read_item
from mgcc_dist.serving.predictions import Predicted, Segmenter, measure
from mgcc_dist.serving.queue import Queue

UPLOADS = ".uploads"
MAX_UPLOAD_BYTES = 2**32
"""of dropped files that are kept, together; older ones have to be dropped again"""
MAX_VIEWS = 4
"""predictions that are kept"""
MAX_ITEMS = 2**12
"""frames and regions of a dropped file"""


class NotFound(UserError):
    """No such item."""


@dataclass(frozen=True)
class View:
    """One item with its pixels and its prediction."""

    item: Item
    image: np.ndarray
    spacing: Spacing | None
    source_sha256: str
    predicted: Predicted

    @property
    def key(self) -> str:
        """What identifies the image in every start of the server."""
        return hashlib.sha256(os.fsencode(f"{self.source_sha256} {self.item.name}")).hexdigest()


@dataclass(frozen=True)
class Upload:
    path: Path
    label: str
    """name for the page"""
    items: list[Item]
    size: int
    """bytes"""


class Session:
    """See the module.

    Args:
        spacing: of images that have none.
    """

    def __init__(
        self, segmenter: Segmenter, corrections: Corrections, queue: Queue, spacing: Spacing | None = None
    ) -> None:
        self.segmenter, self.corrections, self.queue = segmenter, corrections, queue
        self._spacing = spacing
        self._uploads: OrderedDict[int, Upload] = OrderedDict()
        self._views: OrderedDict[str, View] = OrderedDict()
        self._count = 0
        self._lock = threading.Lock()
        self._folder = corrections.folder / UPLOADS
        shutil.rmtree(self._folder, ignore_errors=True)  # left by a kill; this process has the folder's lock

    def open(self) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self.queue.start()

    def close(self) -> None:
        """Stop the scores and delete what was dropped on the page."""
        self.queue.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def receive(self, name: str) -> Path:
        """Return a new file for an upload that the browser calls `name`; who calls `add` deletes it if that fails."""
        suffix = Path(name).suffix.lower()
        suffix = suffix if suffix in DICOM_SUFFIXES else ""  # DICOM without preamble is known by it
        with tempfile.NamedTemporaryFile(suffix=suffix, dir=self._folder, delete=False) as file:
            return Path(file.name)

    def add(self, path: Path, name: str) -> list[str]:
        """Take the uploaded file `path`, that the browser calls `name`; returns the ids of its items.

        Raises:
            BadFile: it can't be used.
        """
        source = open_upload(path, name, sha256_of(path))
        items = items_of(source)
        if len(items) > MAX_ITEMS:
            raise BadFile(path, f"has {len(items)} frames and regions, more than {MAX_ITEMS}. Use `mgcc predict`.")
        with self._lock:
            self._count += 1
            number = self._count
            label = source.file if source.private else Path(name).name
            self._uploads[number] = Upload(path, label, items, path.stat().st_size)
            while len(self._uploads) > 1 and sum(each.size for each in self._uploads.values()) > MAX_UPLOAD_BYTES:
                self._uploads.popitem(last=False)[1].path.unlink(missing_ok=True)
        return [f"u-{number}-{index}" for index in range(len(items))]

    def describe(self, name: str) -> dict[str, Any]:
        """What the page shows of the item `name`. Raises UserError."""
        item, label = self._find(name)
        view = self.view(name)
        height, width = view.image.shape
        saved = self.corrections.mask(item.name, (height, width))
        return {
            "id": name,
            "key": view.key,
            "label": label,
            "name": item.name,
            "width": width,
            "height": height,
            "frame": item.frame + 1,
            "frames": item.source.frames,
            "region": item.region + 1,
            "regions": item.regions,
            "spacing": view.spacing,
            "confidence": view.predicted.confidence,
            "score": view.predicted.score,
            "predicted": measure(view.predicted.mask, view.spacing),
            "saved": None if saved is None else measure(saved, view.spacing),
            "revision": self.corrections.revision(item.name),
        }

    def view(self, name: str) -> View:
        """Read and predict the item `name`, unless that was done recently.

        Raises:
            UserError: it does not exist, or can't be read.
        """
        with self._lock:
            if name in self._views:
                self._views.move_to_end(name)
                return self._views[name]
        item, label = self._find(name)
        try:
            image, spacing = read_item(item, self.queue.bits if name.startswith("q-") else None, self._spacing)
        except BadFile as bad:
            if (index := _queue_index(name)) is not None:
                self.queue.mark_bad(index)
            raise BadFile(Path(label), bad.reason) from bad
        view = View(item, image, spacing, item.source.sha256(), self.segmenter.predict(image, label))
        with self._lock:
            self._views[name] = view
            while len(self._views) > MAX_VIEWS:
                self._views.popitem(last=False)
        return view

    def saved_mask(self, name: str) -> np.ndarray | None:
        """The correction on the disk, uint8 [H,W]. Raises UserError."""
        view = self.view(name)
        return self.corrections.mask(view.item.name, (view.image.shape[0], view.image.shape[1]))

    def save(self, name: str, mask: np.ndarray, key: str, revision: str) -> dict[str, Any]:
        """Write the correction `mask` uint8 [H,W] of 0 and 255; returns what the page shows of it.

        Raises:
            Conflict: the mask was saved by somebody else since the page has read `revision`.
            NotFound: no such item, or since a restart it is another one than `key`.
        """
        view = self.view(name)
        if view.key != key:
            raise NotFound("the image of this page is another one since a restart. Open it again.")
        record = {
            "source_sha256": view.source_sha256,
            "frame": view.item.frame + 1,
            "region": view.item.region + 1,
            "spacing_mm": view.spacing,
            "weights_sha256": self.segmenter.weights_sha256,
            "score": view.predicted.score,
            "changed_pixels": int(np.count_nonzero(mask != view.predicted.mask)),
        }
        revision = self.corrections.save(view.item.name, view.image, mask, revision, record)
        if (index := _queue_index(name)) is not None:
            self.queue.mark_corrected(index)
        return {"revision": revision, "measures": measure(mask, view.spacing), "queue": self.queue.progress()}

    def _find(self, name: str) -> tuple[Item, str]:
        """Return the item `name` and what the page calls it. Raises NotFound."""
        kind, *numbers = name.split("-")
        if not all(number.isascii() and number.isdecimal() and len(number) < 9 for number in numbers):
            raise NotFound(f"{name[:40]}: no such image")
        match kind, [int(number) for number in numbers]:
            case "q", [index] if index < len(self.queue.items):
                item = self.queue.items[index]
                return item, item.source.file
            case "u", [number, index]:
                with self._lock:
                    upload = self._uploads.get(number)
                if upload and index < len(upload.items):
                    return upload.items[index], upload.label
                raise NotFound("this image is no longer kept. Drop its file again.")
        raise NotFound(f"{name[:40]}: no such image")


def _queue_index(name: str) -> int | None:
    """The index in the queue of an item that exists; None for a dropped file."""
    return int(name[2:]) if name.startswith("q-") else None
