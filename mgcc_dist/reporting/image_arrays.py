"""The scores of a run's images as arrays: a tenth of the memory that the objects of result.json take."""

import hashlib
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np

METRICS = ("iou", "recall", "precision", "f1")
PROTOCOLS = ("paper", "corrected", "lesion")
_VALUES = itemgetter(*METRICS)
_NONE = (float("nan"),) * len(METRICS)


class ImageArrays:
    """The images that were scored together, in the order of result.json.

    Args:
        images: the list in result.json.
        names: texts that occurred before. Runs have the same images, so they share the texts.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is not such a list.
    """

    def __init__(self, images: Sequence[dict[str, Any]], names: dict[str, str]) -> None:
        self.keys = [names.setdefault(image["key"], image["key"]) for image in images]
        groups = [image.get("group") for image in images]
        self.groups = [None if group is None else names.setdefault(group, group) for group in groups]
        """of the records; None in results of early versions"""
        self.predicted_empty = [bool(image["predicted_empty"]) for image in images]
        rows = [
            _VALUES(image["paper"])
            + _VALUES(image["corrected"])
            + (_NONE if image["lesion"] is None else _VALUES(image["lesion"]))
            for image in images
        ]
        self.values = np.array(rows, np.float64).reshape(-1, len(PROTOCOLS), len(METRICS))
        """float64 [images, PROTOCOLS, METRICS]; NaN for the lesion protocol of an image without a lesion"""

    def __len__(self) -> int:
        return len(self.keys)

    def protocol(self, name: str) -> np.ndarray:
        """Return the scores under one protocol, float64 [images, METRICS]."""
        return self.values[:, PROTOCOLS.index(name)]

    def mark(self) -> str:
        """Return a digest that is equal for two lists with equal keys and scores."""
        digest = hashlib.sha256("\n".join(self.keys).encode("utf-8", "surrogatepass"))
        digest.update(self.values.tobytes())
        return digest.hexdigest()


def compact(result: dict[str, Any], names: dict[str, str]) -> None:
    """Replace the lists of images in the result of a segmentation run by `ImageArrays`.

    Those of the last weights, which earlier versions stored, are dropped: nothing reads them.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: one is not such a list.
    """
    best, last = result["best"], result["last"]
    for scored in (last, *last.get("external", {}).values()):
        scored.pop("images", None)
    for scored in (best, best.get("test", {}), *best.get("external", {}).values()):
        if "images" in scored:
            scored["images"] = ImageArrays(scored["images"], names)
