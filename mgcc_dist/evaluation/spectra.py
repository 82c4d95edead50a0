"""Spectral distance: the detail that a set of images lacks, or has too much of, compared with another set.

The radial log power spectrum of an image x [H,W] of grey levels 0..255, in dB:

    P_x(u, v) = |sum_ij x_ij exp(-2 pi i (u i / H + v j / W))|^2 / (H W)
    L_x(r)    = mean over the ring |(u, v)| = r of 10 log10(P_x(u, v) + 1/12),   r = 1 .. R = min(H, W) / 2

with |(u, v)| in cycles per shorter side, rounded. 1/12 is the power of rounding to grey levels, below which an image
holds no information. The mean L_X of a set X is over its images. The distance of two sets is the root mean square
difference of their spectra:

    d(X, Y) = sqrt(1/R sum_r (L_X(r) - L_Y(r))^2)   in dB

A blur with the transfer function g gives 20 log10 |g(r)|. The brightness does not matter (r = 0 is left out), nor does
a cyclic shift, which changes only phases. Where details are does not matter either, so read it next to PSNR: noise with
the right spectrum has distance 0.

The mean over a ring is of logarithms, so that the few large coefficients on the axes, which come from the jump between
opposite edges of an image, do not hide the rest.

Source: azimuthal mean of the power spectrum to find images made by a network: Durall, Keuper & Keuper 2020 (CVPR),
Eq. 3-4. Root mean square difference of log spectra: Gray & Markel 1976 (IEEE Trans. ASSP 24), "log spectral distance".
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from mgcc_dist.common.distributed import gather_by_index
from mgcc_dist.data.loader import EvalLoader
from mgcc_dist.evaluation.statistics import grouped_permutation

GREY_LEVELS = 127.5
"""grey levels per unit of an image in [-1, 1]"""
ROUNDING_POWER = 1 / 12
HALVES = 50
"""random halves whose distances are averaged in `spectral_floor`"""
Array = NDArray[np.float64]


def radial_log_spectrum(images: Tensor) -> Tensor:
    """Return L_x(r) in dB, float32 [B,R], of images [B,1,H,W] in [-1, 1]. Differentiable."""
    images = images.float() * GREY_LEVELS
    height, width = images.shape[-2:]
    spectrum = torch.fft.rfft2(images, norm="ortho")
    power = spectrum.real.square() + spectrum.imag.square() + ROUNDING_POWER
    ring, share = (each.to(images.device) for each in _rings(height, width))
    decibels = power.log10().flatten(1) * (10 * share)
    rings = min(height, width) // 2
    return decibels.new_zeros(len(images), rings + 1).index_add(1, ring, decibels)[:, 1:]


@lru_cache(maxsize=8)
def _rings(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the ring int64 of each coefficient of `rfft2`, flattened, and its share float32 in the mean of the ring.

    0 holds everything outside of the rings 1..R. A coefficient with a mirror image in the other half counts twice.
    """
    side = min(height, width)
    u, v = torch.fft.fftfreq(height)[:, None] * side, torch.fft.rfftfreq(width)[None] * side
    ring = torch.hypot(u, v).round().long().flatten()
    ring[ring > side // 2] = 0
    mirrored = torch.full((1, width // 2 + 1), 2.0)
    mirrored[:, 0] = 1
    if width % 2 == 0:
        mirrored[:, -1] = 1
    count = mirrored.expand(height, -1).flatten()
    total = torch.zeros(side // 2 + 1).index_add(0, ring, count)
    return ring, count / total[ring]


def extract_spectra(loader: EvalLoader, accelerator: Accelerator) -> Array:
    """Return the radial log spectra [N,R] of all images of `loader`, in their order, on every rank. Collective."""
    rows = []
    for batch in loader.batches():
        spectra = radial_log_spectrum(batch.to(accelerator.device).images)
        rows += list(zip(batch.offsets.tolist(), spectra.double().cpu().numpy(), strict=True))
    return np.stack(gather_by_index(rows))


def spectral_distance(first: Array, second: Array) -> float:
    """Return d(X, Y) in dB of two sets by the spectra [N,R] and [M,R] of their images."""
    return math.sqrt(np.square(first.mean(axis=0) - second.mean(axis=0)).mean())


def spectral_floor(spectra: Array, groups: Sequence[str]) -> float:
    """Return the mean distance in dB between random halves of one set, whose images belong to `groups`.

    The best that another set of half as many images can reach.
    """
    generator, half = np.random.default_rng(0), len(spectra) // 2
    orders = (grouped_permutation(groups, generator) for _ in range(HALVES))
    return float(np.mean([spectral_distance(spectra[order[:half]], spectra[order[-half:]]) for order in orders]))
