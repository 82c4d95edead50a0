"""The images of `--images` that are still to be corrected, the most uncertain first if that is asked for.

Scores are computed in a thread while the page is in use, and kept in scores.jsonl for the next start.
"""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.data.dicom_regions import Spacing
from mgcc_dist.data.images import BadFile
from mgcc_dist.inference.sources import Source
from mgcc_dist.serving.corrections import SCORES, Corrections, append_line, read_lines
from mgcc_dist.serving.items import items_of, read_item
from mgcc_dist.serving.predictions import Segmenter

logger = logging.getLogger("mgcc_dist.serve")


class Queue:
    """Items by index, in the order of the sources.

    Args:
        bits: that 16-bit pixels use, for all images alike.
        by_score: hand out the lowest score first.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        corrections: Corrections,
        segmenter: Segmenter,
        bits: int | None,
        spacing: Spacing | None,
        by_score: bool,
    ) -> None:
        self.bits, self.by_score = bits, by_score
        self._corrections, self._segmenter, self._spacing = corrections, segmenter, spacing
        self.items = [item for source in sources for item in items_of(source)]
        # Hashes are computed only of files of which there is an earlier correction.
        self._corrected = {
            index
            for index, item in enumerate(self.items)
            if corrections.has_record(item.name) and corrections.is_corrected(item.name, item.source.sha256())
        }
        self._bad = {index for index, item in enumerate(self.items) if item.source.problem}
        self._scores: dict[int, float] = {}
        self._shown: set[int] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def progress(self) -> dict[str, Any]:
        """What the page shows."""
        with self._lock:
            left = self._left()
            return {
                "total": len(self.items),
                "corrected": len(self._corrected),
                "unreadable": len(self._bad),
                "order": "uncertainty" if self.by_score else "name",
                "scored": sum(index in self._scores for index in left) if self.by_score else len(left),
                "left": len(left),
            }

    def next(self, early: bool = False) -> int | None:
        """Return the next item that is not corrected, and was not handed out yet; then those that were skipped.

        None if there is none, or the scores are incomplete, unless `early`.
        """
        with self._lock:
            left = self._left()
            if self.by_score and not early and any(index not in self._scores for index in left):
                return None
            if not set(left) - self._shown:
                self._shown.clear()
            left = [index for index in left if index not in self._shown]
            index = min(left, key=lambda each: (self._scores.get(each, 2.0), each), default=None)
            if index is not None:
                self._shown.add(index)
            return index

    def mark_corrected(self, index: int) -> None:
        with self._lock:
            self._corrected.add(index)

    def mark_bad(self, index: int) -> None:
        """Leave out an item that can't be read."""
        with self._lock:
            self._bad.add(index)

    def start(self) -> None:
        """Begin to compute scores, if the order needs them."""
        if self.by_score:
            self._thread = threading.Thread(target=self._score_all, name="scores", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread after the image that it scores now."""
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _left(self) -> list[int]:
        return [index for index in range(len(self.items)) if index not in self._corrected and index not in self._bad]

    def _score_all(self) -> None:
        path = self._corrections.folder / SCORES
        with self._lock:
            left = self._left()
        try:
            known = {entry.get("id"): float(entry["score"]) for entry in read_lines(path) if "score" in entry}
            with ProgressBar(len(left), "scoring", "images") as bar:
                for index in left:
                    if self._stop.is_set():
                        return
                    self._score(index, known, path)
                    bar.update()
        except Exception as error:  # without a thread the page would wait for ever
            logger.warning("serve: scores stopped (%s); the remaining images follow in the order of names", error)
            with self._lock:
                self._scores |= {index: 2.0 for index in self._left() if index not in self._scores}

    def _score(self, index: int, known: dict[Any, float], path: Path) -> None:
        item = self.items[index]
        digest = item.source.sha256()
        key = f"{digest}-{item.frame}-{item.region}-{self.bits}-{self._segmenter.score_id}"
        if key not in known:
            try:
                image, _ = read_item(item, self.bits, self._spacing)
                known[key] = self._segmenter.score(image, item.name)
            except BadFile as bad:
                logger.warning("serve: %s can't be read: %s", item.source.file, bad.reason)
                self.mark_bad(index)
                return
            except UserError as error:
                logger.warning("serve: %s", error)
                self.mark_bad(index)
                return
            append_line(path, {"id": key, "score": round(known[key], 6)})
        with self._lock:
            self._scores[index] = known[key]
