"""Image corruptions of five strengths each, to measure how scores fall when images get worse.

A corruption takes one grey image float [1,1,S,S] in [0,1] at the size that the network sees, and a random generator, so
that an image is always corrupted in the same way, whatever batch it is in. Strengths are relative to the size. All but
down-sampling are the effects that training images are augmented with (data/effects.py).

speckle     multiplicative noise with a grain of about a pixel at S = 256, as in coherent imaging
gain        all grey values are raised or lowered, because B-mode images show a logarithmic scale
blur        Gaussian blur, as by a wrong focus
shadow      a dark sector from some depth downwards, as behind a rib or a calcification
jpeg        JPEG compression
downsample  resampling to a lower resolution and back
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mgcc_dist.data import effects

STRENGTHS = 5
Corruption = Callable[[Tensor, np.random.Generator], Tensor]


def speckle(image: Tensor, generator: np.random.Generator, deviation: float) -> Tensor:
    """Multiply by 1 + noise of the standard deviation `deviation`."""
    noise = torch.from_numpy(generator.standard_normal(image.shape, dtype=np.float32))
    return effects.speckle(image, torch.tensor([deviation]), noise)


def gain(image: Tensor, generator: np.random.Generator, shift: float) -> Tensor:
    """Add or subtract `shift` of the grey scale; what was black in the image stays black."""
    return effects.gain(image, torch.tensor([shift * generator.choice((-1.0, 1.0))]))


def blur(image: Tensor, generator: np.random.Generator, deviation: float) -> Tensor:
    """Blur by a Gaussian of the standard deviation `deviation`, as a share of the image's side."""
    return effects.blur(image, torch.tensor([deviation]), deviation)


def shadow(image: Tensor, generator: np.random.Generator, depth: float) -> Tensor:
    """Darken a sector below a random point by up to the share `depth`; it covers a quarter of the width."""
    column, row = (torch.tensor([generator.uniform(*ends)]) for ends in ((0.25, 0.75), (0.1, 0.4)))
    return effects.shadow(image, torch.tensor([depth]), column, row, width=torch.tensor([0.2]))


def jpeg(image: Tensor, generator: np.random.Generator, quality: float) -> Tensor:
    """Compress as JPEG of the quality `quality`."""
    return effects.jpeg(image, torch.tensor([quality]))


def downsample(image: Tensor, generator: np.random.Generator, factor: float) -> Tensor:
    """Resample to 1 / `factor` of the resolution and back."""
    size = image.shape[-1]
    small = max(1, round(size / factor))
    resized = F.interpolate(image, (small, small), mode="bilinear", antialias=True)
    return F.interpolate(resized, (size, size), mode="bilinear")


CORRUPTIONS: dict[str, list[Corruption]] = {
    "speckle": [partial(speckle, deviation=value) for value in (0.1, 0.2, 0.35, 0.5, 0.75)],
    "gain": [partial(gain, shift=value) for value in (0.05, 0.1, 0.2, 0.3, 0.4)],
    "blur": [partial(blur, deviation=value) for value in (0.006, 0.01, 0.015, 0.02, 0.03)],
    "shadow": [partial(shadow, depth=value) for value in (0.2, 0.4, 0.6, 0.8, 1.0)],
    "jpeg": [partial(jpeg, quality=value) for value in (50.0, 30.0, 15.0, 10.0, 5.0)],
    "downsample": [partial(downsample, factor=value) for value in (1.5, 2, 3, 4, 6)],
}
"""by name, from the weakest to the strongest"""


def corrupt(images: np.ndarray, keys: Sequence[str], name: str, strength: int, seed: int) -> np.ndarray:
    """Apply the corruption `name` at `strength` (1 to 5) to uint8 [B,S,S], the images of the records `keys`.

    The random numbers are a pure function of seed, name and key: strengths differ in nothing else.
    """
    corruption = CORRUPTIONS[name][strength - 1]
    changed = []
    for key, image in zip(keys, torch.from_numpy(images).float() / 255, strict=True):
        generator = np.random.default_rng([seed, *f"{name}/{key}".encode()])
        changed.append(corruption(image[None, None], generator)[0, 0])
    return (torch.stack(changed) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
