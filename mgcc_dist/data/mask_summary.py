"""What `mgcc shards` says about the masks of a dataset: counts, and the names of those that look wrong."""

from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from mgcc_dist.data.masks import MaskFacts

MOSTLY_LESION = 0.9  # of the image; a lesion is rarely larger, so the mask is probably inverted
SHOWN = 3  # keys named in a line


@dataclass
class MaskSummary:
    """Statistics of the masks at their original size, and what resizing did to them."""

    areas: list[float] = field(default_factory=list)
    """lesion area of each mask that has one, as a fraction of the image"""
    masks: int = 0
    keys: dict[str, list[str]] = field(default_factory=dict)
    """keys of the records that a line is printed for, by kind"""
    ambiguous: list[float] = field(default_factory=list)
    """ambiguous area of each mask with almost two values, as a fraction of its image"""
    values: Counter[str] = field(default_factory=Counter)
    """the lesion value of exactly two-valued mask files"""

    def add(self, key: str, mask: np.ndarray | None, resized: np.ndarray | None, facts: list[MaskFacts]) -> None:
        """Count a record's mask uint8 [H,W], what it became, and how its files were read."""
        if mask is None or resized is None:
            return
        self.masks += 1
        area = float((mask > 0).mean())
        if area > 0:
            self.areas.append(area)
        self.values.update(f"{each.values[1]:g}" for each in facts if each.values)
        ambiguous = [each.ambiguous for each in facts if each.ambiguous is not None]
        if ambiguous:
            self.ambiguous.append(sum(ambiguous) / mask.size)
        kinds = {
            "empty": area == 0,
            "full": area == 1,
            "mostly_lesion": MOSTLY_LESION < area < 1,
            "ambiguous": bool(ambiguous),
            "from_opacity": any(each.from_opacity for each in facts),
            "lost_in_resizing": area > 0 and not resized.any(),
        }
        for kind in (kind for kind, applies in kinds.items() if applies):
            self.keys.setdefault(kind, []).append(key)

    def to_index(self) -> dict[str, Any]:
        """Return the entry "masks" of index.json."""
        return {
            "masks": self.masks,
            "median_lesion_area": round(median(self.areas), 6) if self.areas else None,
            "ambiguous_area": round(sum(self.ambiguous) / len(self.ambiguous), 6) if self.ambiguous else 0.0,
            "lesion_values": dict(sorted(self.values.items())),
            "keys": self.keys,
        }


def describe_masks(entry: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the line of counts of an entry "masks" of index.json, and the lines about masks to look at."""
    keys = {kind: list(listed) for kind, listed in entry["keys"].items()}
    area = entry["median_lesion_area"]
    counts = (
        f"{entry['masks']} masks: {len(keys.get('empty', ()))} empty, {len(keys.get('full', ()))} full, "
        f"{len(keys.get('mostly_lesion', ()))} more than {MOSTLY_LESION:.0%} lesion, "
        f"{len(keys.get('ambiguous', ()))} ambiguous, median lesion area "
        + ("none" if area is None else f"{area:.2%} of the image")
    )
    texts = {
        "full": "are all lesion. Check that the background is 0",
        "mostly_lesion": f"are more than {MOSTLY_LESION:.0%} lesion. Check that they are not inverted",
        "ambiguous": "have more than two values, as after JPEG or smooth resizing, and were thresholded at the "
        f"midpoint ({entry['ambiguous_area']:.2%} of their area is close to neither value)",
        "from_opacity": "have one colour only, so their opacity was read",
        "lost_in_resizing": "lost their lesion in resizing. Choose a larger --size",
    }
    notes = [_named(keys[kind], text) for kind, text in texts.items() if kind in keys]
    if len(entry["lesion_values"]) > 1:
        found = ", ".join(f"{value} in {count} files" for value, count in entry["lesion_values"].items())
        notes.append(f"masks have different lesion values ({found}). Pass --label-values if some are not lesion")
    return counts, notes


def _named(keys: list[str], text: str) -> str:
    shown = ", ".join(map(repr, keys[:SHOWN])) + (", ..." if len(keys) > SHOWN else "")
    return f"{len(keys)} masks {text}: {shown}"
