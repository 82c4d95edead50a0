"""Image corruptions of five strengths each, to measure how scores fall when images get worse.

A corruption takes grey images uint8 [B,S,S] at the size that the network sees, and one random generator per image, so
that an image is always corrupted in the same way, whatever batch it is in. Strengths are relative to the size.

speckle     multiplicative noise with a grain of about a pixel at S = 256, as in coherent imaging
gain        all grey values are raised or lowered, because B-mode images show a logarithmic scale
blur        Gaussian blur, as by a wrong focus
shadow      a dark sector from some depth downwards, as behind a rib or a calcification
jpeg        JPEG compression
downsample  resampling to a lower resolution and back
"""

import io
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image

from mgcc_dist.data.images import resize_image

STRENGTHS = 5
Generators = Sequence[np.random.Generator]
Corruption = Callable[[np.ndarray, Generators], np.ndarray]


def speckle(images: np.ndarray, generators: Generators, deviation: float) -> np.ndarray:
    """Multiply by 1 + noise of the standard deviation `deviation`."""
    from scipy.ndimage import gaussian_filter

    size = images.shape[-1]
    noise = np.stack([generator.standard_normal((size, size), dtype=np.float32) for generator in generators])
    grains = gaussian_filter(noise, sigma=(0, size / 256, size / 256), mode="wrap")
    grains *= deviation / grains.std(axis=(1, 2), keepdims=True)
    return _to_bytes(images * (1 + grains))


def gain(images: np.ndarray, generators: Generators, shift: float) -> np.ndarray:
    """Add or subtract `shift` of the grey scale; what was black in the image stays black."""
    signs = np.array([generator.choice((-1.0, 1.0)) for generator in generators], np.float32)[:, None, None]
    return np.where(images > 0, _to_bytes(images + 255 * shift * signs), images)


def blur(images: np.ndarray, generators: Generators, deviation: float) -> np.ndarray:
    """Blur by a Gaussian of the standard deviation `deviation`, as a share of the image's side."""
    from scipy.ndimage import gaussian_filter

    sigma = deviation * images.shape[-1]
    return _to_bytes(gaussian_filter(images.astype(np.float32), sigma=(0, sigma, sigma), mode="nearest"))


def shadow(images: np.ndarray, generators: Generators, depth: float) -> np.ndarray:
    """Darken a sector below a random point by up to the share `depth`; it covers a quarter of the width."""
    size = images.shape[-1]
    place = np.linspace(0, 1, size, dtype=np.float32)
    center, top = (np.array([g.uniform(*ends) for g in generators]) for ends in ((0.25, 0.75), (0.1, 0.4)))
    below = np.clip((place - top[:, None]) / 0.1, 0, 1)[:, :, None]  # [B,S,1]; soft edges of a tenth of the side
    half_width = 0.1 + 0.05 * np.clip(place - top[:, None], 0, 1)[:, :, None]
    inside = np.clip((half_width - np.abs(place - center[:, None])[:, None, :]) / 0.05 + 0.5, 0, 1)  # [B,S,S]
    return _to_bytes(images * (1 - depth * below * inside))


def jpeg(images: np.ndarray, generators: Generators, quality: int) -> np.ndarray:
    """Compress as JPEG of the quality `quality`."""
    return np.stack([_through_jpeg(image, quality) for image in images])


def downsample(images: np.ndarray, generators: Generators, factor: float) -> np.ndarray:
    """Resample to 1 / `factor` of the resolution and back."""
    size = images.shape[-1]
    small = max(1, round(size / factor))
    return np.stack([resize_image(resize_image(image, small, small), size, size) for image in images])


CORRUPTIONS: dict[str, list[Corruption]] = {
    "speckle": [partial(speckle, deviation=value) for value in (0.1, 0.2, 0.35, 0.5, 0.75)],
    "gain": [partial(gain, shift=value) for value in (0.05, 0.1, 0.2, 0.3, 0.4)],
    "blur": [partial(blur, deviation=value) for value in (0.006, 0.01, 0.015, 0.02, 0.03)],
    "shadow": [partial(shadow, depth=value) for value in (0.2, 0.4, 0.6, 0.8, 1.0)],
    "jpeg": [partial(jpeg, quality=value) for value in (50, 30, 15, 10, 5)],
    "downsample": [partial(downsample, factor=value) for value in (1.5, 2, 3, 4, 6)],
}
"""by name, from the weakest to the strongest"""


def corrupt(images: np.ndarray, keys: Sequence[str], name: str, strength: int, seed: int) -> np.ndarray:
    """Apply the corruption `name` at `strength` (1 to 5) to uint8 [B,S,S], the images of the records `keys`.

    The random numbers are a pure function of seed, name and key: strengths differ in nothing else.
    """
    generators = [np.random.default_rng([seed, *f"{name}/{key}".encode()]) for key in keys]
    return CORRUPTIONS[name][strength - 1](images, generators)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="JPEG", quality=quality)
    with Image.open(content) as read:
        return np.asarray(read)
