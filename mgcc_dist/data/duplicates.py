"""Find near-duplicate images in a dataset without patient ids, so that a split can keep them together.

BUSI shows the same lesion many times: the same frame saved again, with and without callipers, a few frames later. Two
images are compared by the normalised correlation of their structure, maximised over small shifts:

1. Crop 6% off each border (depth scales, logos) and shrink to 48 x 48.
2. Keep only structure: a band-pass (Gaussians of 0.7 and 3 pixels) removes speckle and the bright-to-dark gradient
   that all ultrasound images share; dividing by the local contrast (4 pixels) gives deep, dark regions equal weight.
3. Correlate the inner 42 x 42 pixels of one image with the other, shifted by up to 3 pixels in each direction; keep the
   maximum.

Why a threshold of 0.5: without steps 2 and 3, unrelated BUSI images correlate by up to 0.95 and no threshold separates
them from duplicates. With these steps 99.99% of the pairs of different BUS-BRA patients stay below 0.46, and the
highest of 262,000 is 0.53; all BUSI pairs above 0.5 show the same lesion on inspection. A false link only makes a split
slightly coarser; a missed one is a leak.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image
from scipy.ndimage import fourier_gaussian
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SIDE = 48  # pixels
BORDER = 0.06  # of each side
SHIFT = 3  # pixels
THRESHOLD = 0.5
BLOCK = 1024  # images compared with all others at a time, to bound memory
NOISE_CONTRAST = 5.0  # grey levels: structure of lower contrast is noise


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Return the structure float32 [48,48] of an image uint8 [H,W] (steps 1 and 2)."""
    height, width = image.shape
    top, left = round(height * BORDER), round(width * BORDER)
    inner = Image.fromarray(image[top : height - top, left : width - left])
    small = np.asarray(inner.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    structure = _blur(small, 0.7) - _blur(small, 3.0)
    contrast = np.sqrt(np.maximum(_blur(structure**2, 4.0), 0) + NOISE_CONTRAST**2)
    return (structure / contrast).astype(np.float32)


def similar_pairs(thumbnails: Sequence[np.ndarray], threshold: float = THRESHOLD) -> list[tuple[int, int, float]]:
    """Return all (i, j, correlation) with i < j and a correlation (step 3) above `threshold`. Takes O(N^2) time."""
    found: dict[tuple[int, int], float] = {}
    for start in range(0, len(thumbnails), BLOCK):
        block = np.stack(thumbnails[start : start + BLOCK])
        centre = _normalize(block[:, SHIFT:-SHIFT, SHIFT:-SHIFT])
        shifted = (_normalize(windows) for windows in _shifted_windows(np.stack(thumbnails)))
        best = functools.reduce(np.maximum, (centre @ windows.T for windows in shifted))
        for row, j in np.argwhere(best > threshold).tolist():
            i = start + row
            if i != j:
                pair = (min(i, j), max(i, j))
                found[pair] = max(found.get(pair, -1.0), float(best[row, j]))
    return [(i, j, correlation) for (i, j), correlation in sorted(found.items())]


def groups(keys: Sequence[str], pairs: Sequence[tuple[int, int, float]]) -> list[str]:
    """Return each key's group: the connected components of the pairs, named by their first key in sorted order."""
    rows, columns = [i for i, _, _ in pairs], [j for _, j, _ in pairs]
    links = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(len(keys), len(keys)))
    _, components = connected_components(links, directed=False)
    names: dict[int, str] = {}
    for key, component in zip(keys, components.tolist(), strict=True):
        names[component] = min(key, names.get(component, key))
    return [names[component] for component in components.tolist()]


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Convolve `image` [side,side] with a Gaussian, with periodic boundaries."""
    side = len(image)
    return np.fft.irfft2(fourier_gaussian(np.fft.rfft2(image), sigma, side), (side, side))


def _shifted_windows(thumbnails: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the windows [N,42,42] of thumbnails [N,48,48] at all shifts."""
    inner = SIDE - 2 * SHIFT
    for y in range(2 * SHIFT + 1):
        for x in range(2 * SHIFT + 1):
            yield thumbnails[:, y : y + inner, x : x + inner]


def _normalize(windows: np.ndarray) -> np.ndarray:
    """Flatten windows [N,h,w] to rows [N,h*w] of zero mean and unit length (images without structure stay zero)."""
    rows = windows.reshape(len(windows), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
