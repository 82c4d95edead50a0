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

All pairs of 20,000 images would take half an hour that way. So only candidates are compared: pairs of which the low
frequencies correlate (a disc of the discrete cosine transform, every second shift). Of 806 pairs above the threshold
(BUSI, BUS-BRA, DDTI and distorted copies of their images) the low frequencies of all correlate by more than 0.47.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from scipy.fft import dctn, irfft2, rfft2
from scipy.ndimage import fourier_gaussian
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SIDE = 48  # pixels
BORDER = 0.06  # of each side
SHIFT = 3  # pixels
INNER = SIDE - 2 * SHIFT
THRESHOLD = 0.5
CANDIDATE = 0.45  # correlation of the low frequencies above which a pair is compared
LOW_FREQUENCIES = 16  # half-periods per window
BLOCK = 1024  # images compared with as many others at a time, to bound memory
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


def groups(images: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
    """Group images, given as keys and thumbnails, by similarity: return each key's group.

    Groups are the connected components of the pairs whose correlation (step 3) is above the threshold, named by their
    first key in sorted order.
    """
    keys: list[str] = []
    thumbnails = np.empty((0, SIDE, SIDE), np.float32)
    descriptors: list[np.ndarray] = []
    links = np.empty((0, 2), np.int64)
    images = iter(images)
    while block := list(islice(images, BLOCK)):
        keys += [key for key, _ in block]
        thumbnails = np.concatenate([thumbnails, *(thumbnail[None] for _, thumbnail in block)])
        descriptors.append(_describe(thumbnails[-len(block) :]))
        for i, earlier in enumerate(descriptors):
            pairs = _candidates(earlier, descriptors[-1], same=earlier is descriptors[-1])
            pairs += np.array([i * BLOCK, (len(descriptors) - 1) * BLOCK])
            links = _link(thumbnails, pairs, links)
    names: dict[int, str] = {}
    components = _components(links, len(keys)).tolist()
    for key, component in zip(keys, components, strict=True):
        names[component] = min(key, names.get(component, key))
    return {key: names[component] for key, component in zip(keys, components, strict=True)}


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlate each thumbnail of `first` [N,48,48] with that of `second` (step 3), in both directions: float32 [N]."""
    return np.maximum(_best_correlation(first, second), _best_correlation(second, first))


def _best_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlate the inner pixels of each thumbnail of `first` with all windows of that of `second`: float32 [N]."""
    inner = _normalize(first[:, SHIFT:-SHIFT, SHIFT:-SHIFT]).reshape(-1, INNER, INNER)
    spectra = np.conj(rfft2(inner, (SIDE, SIDE))) * rfft2(second)
    products = irfft2(spectra, (SIDE, SIDE))[:, : 2 * SHIFT + 1, : 2 * SHIFT + 1]
    variances = _window_sums(second**2) - _window_sums(second) ** 2 / INNER**2
    return np.asarray((products / np.sqrt(np.maximum(variances, 1e-12))).max(axis=(1, 2)))


def _window_sums(values: np.ndarray) -> np.ndarray:
    """Sum values [N,48,48] over all windows of 42 x 42: [N,7,7]."""
    rows = sliding_window_view(values, INNER, axis=1).sum(axis=-1)
    return np.asarray(sliding_window_view(rows, INNER, axis=2).sum(axis=-1))


def _describe(thumbnails: np.ndarray) -> np.ndarray:
    """Return the low frequencies of the windows [N,48,48] at every second shift: float16 [N,25,213], unit length."""
    radius = np.hypot(*np.mgrid[:INNER, :INNER])
    low = (radius > 0) & (radius < LOW_FREQUENCIES)
    windows = islice(_shifted_windows(thumbnails), 0, None, 2)
    spectra = (dctn(each, axes=(1, 2), norm="ortho")[:, low] for each in windows)
    return np.stack([_normalize(each).astype(np.float16) for each in spectra], axis=1)


def _candidates(earlier: np.ndarray, block: np.ndarray, same: bool) -> np.ndarray:
    """Return the pairs [P,2] of rows whose low frequencies correlate, the most similar first; i < j if `same`."""
    first, second = earlier.astype(np.float32), block.astype(np.float32)
    shifts = first.shape[1]
    best = np.full((len(first), len(second)), -1.0, np.float32)
    for shift in range(shifts):
        np.maximum(best, first[:, shifts // 2] @ second[:, shift].T, out=best)
        np.maximum(best, first[:, shift] @ second[:, shifts // 2].T, out=best)
    pairs = np.argwhere(np.triu(best, 1) > CANDIDATE if same else best > CANDIDATE)
    return pairs[np.argsort(-best[pairs[:, 0], pairs[:, 1]], kind="stable")]


def _link(thumbnails: np.ndarray, pairs: np.ndarray, links: np.ndarray) -> np.ndarray:
    """Add to `links` those of `pairs` that are similar; pairs that are connected already are not compared.

    In a video of a thousand frames almost all of the half a million pairs are similar.
    """
    while True:
        component = _components(links, len(thumbnails))
        pairs = pairs[component[pairs[:, 0]] != component[pairs[:, 1]]]
        if not len(pairs):
            return links
        compared, pairs = pairs[:BLOCK], pairs[BLOCK:]
        similar = correlations(thumbnails[compared[:, 0]], thumbnails[compared[:, 1]]) > THRESHOLD
        links = np.concatenate([links, compared[similar]])


def _components(links: np.ndarray, count: int) -> np.ndarray:
    """Return the number of the connected component of each of `count` images."""
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Convolve `image` [side,side] with a Gaussian, with periodic boundaries."""
    side = len(image)
    return np.fft.irfft2(fourier_gaussian(np.fft.rfft2(image), sigma, side), (side, side))


def _shifted_windows(thumbnails: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the windows [N,42,42] of thumbnails [N,48,48] at all shifts."""
    for y in range(2 * SHIFT + 1):
        for x in range(2 * SHIFT + 1):
            yield thumbnails[:, y : y + INNER, x : x + INNER]


def _normalize(windows: np.ndarray) -> np.ndarray:
    """Flatten windows [N,h,w] to rows [N,h*w] of zero mean and unit length (images without structure stay zero)."""
    rows = windows.reshape(len(windows), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
