"""Near-duplicate images of a data set without patient ids, so that a split can keep them on one side.

BUSI holds the same lesion many times: the same frame saved again, with and without callipers, a few frames later. Two
images are compared by the normalised correlation of their structure, best over small shifts:

1. Cut 6% off each border (depth scales, logos), shrink to 48 x 48.
2. Keep structure alone: a band-pass (Gaussians of 0.7 and 3 pixels) removes speckle and what all ultrasound shares,
   bright above and dark below; division by the local contrast (4 pixels) makes deep, dark parts count as much.
3. Correlate the inner 42 x 42 pixels of one with the other shifted by up to 3 pixels either way; keep the best.

Why 0.5: without steps 2 and 3 unrelated BUSI images correlate up to 0.95 and there is no gap; with them 99.99% of the
pairs of different BUS-BRA patients stay under 0.46 and the highest of 262,000 is 0.53, while all BUSI pairs over 0.5
show the same lesion when looked at. A wrong link costs nothing but a slightly coarser split; a missed one is a leak.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

SIDE = 48  # pixels
BORDER = 0.06  # of each side
SHIFT = 3  # pixels
THRESHOLD = 0.5
ROWS = 1024  # images compared with all others at a time, to bound memory
FAINT = 5.0  # grey levels: structure of less contrast than this is noise


def thumbnail(image: np.ndarray) -> np.ndarray:
    """The structure float32 [48,48] of an image uint8 [H,W] (steps 1 and 2)."""
    height, width = image.shape
    top, left = round(height * BORDER), round(width * BORDER)
    inner = Image.fromarray(image[top : height - top, left : width - left])
    small = np.asarray(inner.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    structure = _blurred(small, 0.7) - _blurred(small, 3.0)
    contrast = np.sqrt(np.maximum(_blurred(structure**2, 4.0), 0) + FAINT**2)
    return (structure / contrast).astype(np.float32)


def similar_pairs(thumbnails: Sequence[np.ndarray], threshold: float = THRESHOLD) -> list[tuple[int, int, float]]:
    """All (i, j, correlation) with i < j whose correlation (step 3) is over `threshold`; takes N^2 time."""
    found: dict[tuple[int, int], float] = {}
    for start in range(0, len(thumbnails), ROWS):
        some = np.stack(thumbnails[start : start + ROWS])
        centre = _unit(some[:, SHIFT:-SHIFT, SHIFT:-SHIFT])
        best = functools.reduce(np.maximum, (centre @ _unit(window).T for window in _windows(np.stack(thumbnails))))
        for row, j in np.argwhere(best > threshold).tolist():
            i = start + row
            if i != j:
                pair = (min(i, j), max(i, j))
                found[pair] = max(found.get(pair, -1.0), float(best[row, j]))
    return [(i, j, correlation) for (i, j), correlation in sorted(found.items())]


def groups(keys: Sequence[str], pairs: Sequence[tuple[int, int, float]]) -> list[str]:
    """For each key the name of its group: the first, in sorted order, of the keys that chains of pairs join it to."""
    leader = list(range(len(keys)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for i, j, _ in pairs:
        first, second = sorted((find(i), find(j)), key=lambda place: keys[place])
        leader[second] = first
    return [keys[find(i)] for i in range(len(keys))]


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """`image` [side,side] convolved with a Gaussian, around the ends."""
    side = len(image)
    frequency = np.fft.fftfreq(side)
    gaussian = np.exp(-2 * (np.pi * sigma) ** 2 * (frequency[:, None] ** 2 + frequency[None, : side // 2 + 1] ** 2))
    return np.fft.irfft2(np.fft.rfft2(image) * gaussian, (side, side))


def _windows(thumbnails: np.ndarray) -> Iterator[np.ndarray]:
    """The windows [N,42,42] of thumbnails [N,48,48] at all shifts."""
    inner = SIDE - 2 * SHIFT
    for y in range(2 * SHIFT + 1):
        for x in range(2 * SHIFT + 1):
            yield thumbnails[:, y : y + inner, x : x + inner]


def _unit(windows: np.ndarray) -> np.ndarray:
    """Windows [N,h,w] as rows [N,h*w] of zero mean and unit length (an image without structure stays zero)."""
    rows = windows.reshape(len(windows), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
