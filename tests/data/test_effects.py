"""Effects on ultrasound images: what each does, on any device, and that JPEG is Pillow's to within rounding."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from mgcc_dist.data import effects
from mgcc_dist.data.phantom import draw


@pytest.fixture(scope="module")
def images():
    """Three phantoms [3,1,64,64] in [0,1]."""
    pixels = np.stack([draw(seed=0, index=i, size=64).image for i in range(3)])
    return torch.from_numpy(pixels)[:, None].float() / 255


def of(*values):
    return torch.tensor(values)


def neutral(images):
    """Each effect at the strength that changes nothing."""
    zero, one = torch.zeros(len(images)), torch.ones(len(images))
    return {
        "speckle": lambda x: effects.speckle(x, zero, torch.randn_like(x)),
        "gain": lambda x: effects.gain(x, zero),
        "time_gain": lambda x: effects.time_gain(x, zero[:, None].expand(-1, 4)),
        "gamma": lambda x: effects.gamma(x, one),
        "blur": lambda x: effects.blur(x, zero, 0.03),
        "shadow": lambda x: effects.shadow(x, zero, one / 2, zero, one / 4),
    }


def test_effects_of_no_strength_return_the_images(images):
    for name, effect in neutral(images).items():
        torch.testing.assert_close(effect(images), images, rtol=0, atol=1e-6, msg=name)


def test_each_image_has_its_own_strength(images):
    """The first of two equal images is unchanged, the second is not, and values stay in [0,1]."""
    pair = images[:1].expand(2, -1, -1, -1)
    changed = {
        "speckle": effects.speckle(pair, of(0.0, 0.8), torch.randn_like(pair)),
        "gain": effects.gain(pair, of(0.0, 0.7)),
        "time_gain": effects.time_gain(pair, of([0.0, 0.0], [-0.5, 0.5])),
        "gamma": effects.gamma(pair, of(1.0, 0.5)),
        "blur": effects.blur(pair, of(0.0, 0.02), 0.02),
        "shadow": effects.shadow(pair, of(0.0, 1.0), of(0.5, 0.5), of(0.2, 0.2), of(0.3, 0.3)),
    }
    for name, (first, second) in changed.items():
        torch.testing.assert_close(first, pair[0], rtol=0, atol=1e-6, msg=name)
        assert (second - pair[1]).abs().max() > 0.1, name
        assert second.min() >= 0, name
        assert second.max() <= 1, name


def test_gain_keeps_black_black():
    pixels = of([[0.0, 0.5]])[None]
    torch.testing.assert_close(effects.gain(pixels, of(0.2)), of([[0.0, 0.7]])[None])


def test_time_gain_changes_with_depth_only():
    brighter = effects.time_gain(torch.full((1, 1, 5, 3), 0.5), of([-0.2, 0.2]))[0, 0]
    torch.testing.assert_close(brighter, of(0.3, 0.4, 0.5, 0.6, 0.7)[:, None].expand(5, 3))


def test_blur_is_scipys_gaussian_filter(images):
    sigma = 0.02 * 64
    expected = gaussian_filter(images[0, 0].numpy(), sigma, mode="nearest", truncate=3)
    np.testing.assert_allclose(effects.blur(images[:1], of(0.02), 0.02)[0, 0].numpy(), expected, atol=2e-3)


def test_speckle_has_the_standard_deviation_asked_for():
    torch.manual_seed(0)
    grey = torch.full((1, 1, 128, 128), 0.5)
    noisy = effects.speckle(grey, of(0.2), torch.randn_like(grey))
    assert abs(noisy.std().item() - 0.1) < 1e-3
    assert abs(noisy.mean().item() - 0.5) < 0.01


def test_shadow_darkens_below_its_top_and_nowhere_else():
    white = torch.ones(1, 1, 101, 101)
    shaded = effects.shadow(white, of(0.8), of(0.5), of(0.4), of(0.2))[0, 0]
    assert (shaded[:40] == 1).all()
    assert (shaded[:, :30] == 1).all()
    assert abs(shaded[100, 50].item() - 0.2) < 1e-6


@pytest.mark.parametrize("quality", [5, 20, 60])
def test_jpeg_equals_pillows(images, quality):
    """The rounding differs: kornia's is differentiable. Compression itself costs more than that."""
    content = io.BytesIO()
    Image.fromarray((images[0, 0].numpy() * 255).round().astype(np.uint8)).save(content, "JPEG", quality=quality)
    expected = np.asarray(Image.open(content)) / 255
    ours = effects.jpeg(images[:1], of(float(quality)))[0, 0].numpy()
    difference, loss = (np.sqrt(np.mean((other - expected) ** 2)) for other in (ours, images[0, 0].numpy()))
    assert difference < 0.012
    assert difference < loss / 2


def test_no_effect_reads_a_value_from_the_device(images):
    """On the meta device there are no values to read."""
    meta = images.to("meta")
    ones = torch.ones(3, device="meta")
    for changed in (
        effects.speckle(meta, ones, torch.randn_like(meta)),
        effects.gain(meta, ones),
        effects.time_gain(meta, ones[:, None].expand(-1, 4)),
        effects.gamma(meta, ones),
        effects.blur(meta, ones, 0.02),
        effects.shadow(meta, ones, ones, ones, ones),
        effects.jpeg(meta, torch.full((3,), 30.0)),
    ):
        assert changed.shape == meta.shape
