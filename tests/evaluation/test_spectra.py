"""Radial power spectra: known answers for noise and filters, invariance, floor."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mgcc_dist.evaluation.spectra import radial_log_spectrum, spectral_distance, spectral_floor

SIZE = 32


def speckle(count, seed=0):
    """Smooth images with multiplicative noise, [B,1,32,32] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(count, 1, 4, 4, generator=generator), SIZE, mode="bilinear")
    return (smooth * torch.rand(count, 1, SIZE, SIZE, generator=generator)) * 2 - 1


def spectra(images):
    return radial_log_spectrum(images).double().numpy()


def filtered(images, gain):
    """Multiply the spectra by gain(r), r in cycles per image."""
    frequency = torch.fft.fftfreq(SIZE) * SIZE
    radius = torch.hypot(frequency[:, None], frequency[None])
    return torch.fft.ifft2(torch.fft.fft2(images) * gain(radius)).real


def blurred(images, sigma):
    return filtered(images, lambda r: torch.exp(-((2 * math.pi * r / SIZE * sigma) ** 2) / 2))


def test_white_noise_has_its_variance_at_every_frequency():
    """The mean logarithm of a chi-squared variable of 2 degrees of freedom is ln 2 - Euler's constant."""
    deviation = 10 / 127.5
    found = spectra(torch.randn(400, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * deviation)
    expected = 10 * math.log10(10**2) - 10 / math.log(10) * np.euler_gamma
    assert found.shape == (400, SIZE // 2)
    # The Nyquist ring has a few real coefficients, with one degree of freedom.
    np.testing.assert_allclose(found.mean(axis=0)[:-1], expected, atol=0.4)


def test_ring_means_match_the_definition():
    images = speckle(2)
    power = torch.fft.fft2(images[:, 0].double() * 127.5).abs() ** 2 / SIZE**2
    frequency = torch.fft.fftfreq(SIZE) * SIZE
    ring = torch.hypot(frequency[:, None], frequency[None]).round()
    expected = [(10 * torch.log10(power[:, ring == r] + 1 / 12)).mean(dim=1) for r in range(1, SIZE // 2 + 1)]
    np.testing.assert_allclose(spectra(images), torch.stack(expected, dim=1).numpy(), rtol=1e-4)


def test_equal_sets_have_distance_0():
    images = spectra(speckle(4))
    assert spectral_distance(images, images) == 0
    assert spectral_distance(images, images[::-1]) == pytest.approx(0, abs=1e-9)


def test_band_of_noise_with_half_the_amplitude_is_20_log10_of_2_away_in_its_share_of_rings():
    noise = torch.randn(4, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    halved = filtered(noise, lambda r: torch.where((r >= 7.5) & (r < 11.5), 0.5, 1.0))  # 4 of 16 rings
    expected = math.sqrt(4 / 16) * 20 * math.log10(2)
    assert spectral_distance(spectra(noise), spectra(halved)) == pytest.approx(expected, rel=1e-3)


def test_distance_grows_with_blur():
    images = speckle(4)
    distances = [spectral_distance(spectra(images), spectra(blurred(images, sigma))) for sigma in (0.25, 0.5, 1, 2)]
    assert distances == sorted(distances)
    assert distances[0] > 0.2


def test_shift_and_brightness_do_not_matter():
    images = speckle(4)
    moved = images.roll((5, -9), dims=(2, 3)) + 0.3
    np.testing.assert_allclose(spectra(moved), spectra(images), atol=1e-3)


def test_floor_is_the_distance_between_halves_and_shrinks_with_more_images():
    images, groups = spectra(speckle(64)), [str(i // 2) for i in range(64)]
    floor = spectral_floor(images, groups)
    sets = [spectra(speckle(32, seed)) for seed in range(1, 21)]
    other = np.mean([spectral_distance(first, second) for first, second in zip(sets[::2], sets[1::2], strict=True)])
    assert floor == pytest.approx(other, rel=0.3)
    assert spectral_floor(images[:16], groups[:16]) > 1.3 * floor
    copies = np.repeat(images[:1], 8, axis=0)
    assert spectral_floor(copies, groups[:8]) == 0
