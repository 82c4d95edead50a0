"""Built-in synthetic data: images that look like breast ultrasound, with exact lesion masks.

`draw(seed, index, size)` is a pure function. It draws the scene in coordinates where the image is the unit square (x to
the right, y into depth), so anatomy and mask are the same at any size; only the texture depends on the size:

1. Four layers with curved boundaries: skin, fat with septa, fibroglandular tissue, muscle with fascia along its fibres.
2. Distractors that are not lesions: dark fat lobules, shadows from poor contact and from ligaments.
3. A lesion, in BUSI's proportions (56% benign, 27% malignant, 17% none). Benign: a smooth ellipse, wider than tall,
   with a thin bright rim and often enhancement below it; some are cysts. Malignant: irregular, spiculated, taller,
   darker, heterogeneous, with a blurred halo and a shadow below it.
4. Depth attenuation, Rayleigh speckle (envelope of correlated complex Gaussian noise) and log compression.

All brightness is in decibels until the last step, which maps 54 dB to 0..255. Speckle alone spreads tissue by up to
4 dB, and fat, muscle and shadows are as dark as many lesions, so thresholding does not find the lesions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import fourier_gaussian, map_coordinates
from scipy.special import expit

from mgcc_dist.common.errors import UserError

CLASSES = ("benign", "malignant", "normal")
SHARES = (0.56, 0.27, 0.17)
DYNAMIC_RANGE = 54.0  # dB from black to white


@dataclass(frozen=True)
class Phantom:
    """`image` uint8 [size,size]; `mask` uint8 [size,size], 0 or 255, all 0 if `category` is "normal"."""

    image: np.ndarray
    mask: np.ndarray
    category: str


def draw(seed: int, index: int, size: int) -> Phantom:
    """Draw phantom `index` of the endless series `seed`, `size` x `size` pixels.

    Raises:
        UserError: the size is below 16 pixels, too small to show the anatomy.
    """
    if size < 16:
        raise UserError(f"image size: {size} is too small for a phantom. Choose at least 16 pixels per side.")
    canvas = _Canvas(seed, index, size)
    category = str(canvas.random.choice(CLASSES, p=SHARES))
    level = _tissue(canvas) + _lobules(canvas)
    lesion = np.zeros((size, size), dtype=bool)
    if category != "normal":
        level, lesion = _with_lesion(canvas, level, malignant=category == "malignant")
    level = level + _depth_and_contact(canvas) + _speckle(canvas) + canvas.random.uniform(-9, 1)
    image = np.clip(255 * (1 + level / DYNAMIC_RANGE), 0, 255).astype(np.uint8)
    return Phantom(image, lesion.astype(np.uint8) * 255, category)


class _Canvas:
    """Coordinates x [1,size] and y [size,1] of a phantom, and its two random number generators.

    `random` draws the scene, with the same calls at any size; `noise` uses the other generator.
    """

    def __init__(self, seed: int, index: int, size: int) -> None:
        self.size = size
        self.x = (np.arange(size)[None, :] + 0.5) / size
        self.y = (np.arange(size)[:, None] + 0.5) / size
        self.random = np.random.default_rng((seed, index))
        self._texture = np.random.default_rng((seed, index, 1))

    def noise(self, sigma_y: float, sigma_x: float) -> np.ndarray:
        """Draw Gaussian noise [size,size] of unit variance, smoothed by Gaussians of these sigmas in image widths."""
        shape = (self.size, self.size)
        spectrum = np.fft.rfft2(self._texture.standard_normal(shape))
        smooth = np.fft.irfft2(fourier_gaussian(spectrum, (sigma_y * self.size, sigma_x * self.size), self.size), shape)
        return (smooth - smooth.mean()) / smooth.std()

    def curve(self, height: float) -> np.ndarray:
        """Draw a smooth random function of x [1,size], about `height` high."""
        curve = self.random.normal(0, 0.5) * (self.x - 0.5)
        for k in (1, 2, 3):
            phase = self.random.uniform(0, 2 * np.pi)
            curve = curve + self.random.normal(0, 0.6 / k) * np.cos(np.pi * k * self.x + phase)
        return height * curve

    def distance(
        self,
        centre: tuple[float, float],
        half_axes: tuple[float, float],
        wobble: float,
        spicules: Sequence[tuple[float, float]] = (),
    ) -> np.ndarray:
        """Draw the approximate distance [size,size] to a tilted ellipse's outline, negative inside, in image widths.

        The outline wobbles by smooth harmonics of relative height `wobble`; a spicule is (angle, relative height).
        """
        tilt = self.random.uniform(-0.3, 0.3)
        dx, dy = self.x - centre[0], self.y - centre[1]
        u = (np.cos(tilt) * dx + np.sin(tilt) * dy) / half_axes[0]
        v = (np.cos(tilt) * dy - np.sin(tilt) * dx) / half_axes[1]
        radius, angle = np.hypot(u, v), np.arctan2(v, u)
        outline = np.ones_like(angle)
        for order in range(2, 8 if spicules else 5):
            phase = self.random.uniform(0, 2 * np.pi)
            outline += self.random.normal(0, wobble) * np.cos(order * angle + phase) / np.sqrt(order - 1)
        for direction, height in spicules:
            outline += height * np.exp(self.random.uniform(25, 160) * (np.cos(angle - direction) - 1))
        return (radius - outline) * np.sqrt(half_axes[0] * half_axes[1])


def _tissue(canvas: _Canvas) -> np.ndarray:
    """Draw the level [size,size] in dB of the four layers."""
    random, y = canvas.random, canvas.y
    skin_end = random.uniform(0.03, 0.06) + canvas.curve(0.006)
    fat_end = random.uniform(0.14, 0.34) + canvas.curve(0.04)
    gland_end = random.uniform(0.58, 0.85) + canvas.curve(0.05)
    in_skin = _above(skin_end, y, 0.006)
    in_fat = _above(fat_end, y, 0.01) * (1 - in_skin)
    in_muscle = 1 - _above(gland_end, y, 0.01)
    in_gland = 1 - in_skin - in_fat - in_muscle
    skin, fat, gland, muscle = (random.uniform(*dB) for dB in ((-18, -9), (-39, -30), (-32, -22), (-42, -33)))
    level = skin * in_skin + fat * in_fat + gland * in_gland + muscle * in_muscle

    fibres = canvas.curve(0.06)
    fine = _shift_columns(canvas.noise(0.012, 0.06), fibres)
    coarse = _shift_columns(canvas.noise(0.04, 0.14), fibres)
    streaks = random.uniform(1.5, 3.5) * (fine + 0.5 * fine**2)  # a few bright, many dim
    level += (4 * coarse + streaks) * (in_gland + 0.7 * in_muscle + 0.2 * in_fat)
    # The zero level set of smooth noise consists of long thin curves, like septa and fascia.
    septa = np.exp(-((_shift_columns(canvas.noise(0.03, 0.14), fibres) / 0.13) ** 2))
    fascia = np.exp(-((_shift_columns(canvas.noise(0.025, 0.3), fibres) / 0.15) ** 2))
    patchy = np.clip(canvas.noise(0.05, 0.1) + 0.6, 0, 1.5)
    level += patchy * septa * (random.uniform(7, 13) * in_fat + random.uniform(2, 7) * in_gland)
    level += patchy * fascia * (random.uniform(7, 13) * in_muscle + random.uniform(2, 6) * in_gland)
    return level + 9 * np.exp(-(((y - gland_end) / 0.008) ** 2)) + 5 * np.exp(-(((y - fat_end) / 0.008) ** 2))


def _lobules(canvas: _Canvas) -> np.ndarray:
    """Draw the change [size,size] in dB by fat lobules: dark ovals with a bright capsule, weaker than lesions."""
    random = canvas.random
    change = np.zeros((canvas.size, canvas.size))
    for _ in range(random.integers(0, 5)):
        centre = (random.uniform(0, 1), random.uniform(0.12, 0.7))
        distance = canvas.distance(centre, half_axes=(0.09, 0.035), wobble=0.05)
        change -= random.uniform(3, 7) * expit(-distance / 0.012)
        change += random.uniform(2, 6) * np.exp(-((distance / 0.008) ** 2))
    return change


def _with_lesion(canvas: _Canvas, level: np.ndarray, malignant: bool) -> tuple[np.ndarray, np.ndarray]:
    """Add a lesion and its shadow or enhancement to `level` [size,size] in dB; also return its mask, bool."""
    random = canvas.random
    half_width = np.exp(random.uniform(np.log(0.07), np.log(0.24)))
    aspect = random.uniform(0.65, 1.25) if malignant else random.uniform(1.15, 2.2)
    half_axes = (half_width, min(half_width / aspect, 0.26))
    centre = (random.uniform(0.22, 0.78), random.uniform(0.12 + half_axes[1], max(0.62, 0.16 + half_axes[1])))
    if malignant:
        longest = min(0.5, 0.05 / half_width)
        spicules = [
            (random.uniform(-np.pi, np.pi), random.uniform(0.1, longest)) for _ in range(random.integers(6, 18))
        ]
        distance = canvas.distance(centre, half_axes, 0.07, spicules)
        drop, edge, mottle = random.uniform(11, 21), random.uniform(0.006, 0.016), random.uniform(2, 5)
        cast = -random.uniform(2, 16)
    else:
        cyst = random.random() < 0.2
        distance = canvas.distance(centre, half_axes, 0.03)
        drop, edge, mottle = random.uniform(7, 15), random.uniform(0.003, 0.008), random.uniform(0.5, 2)
        drop, cast = (2 * drop, random.uniform(5, 10)) if cyst else (drop, random.uniform(-3, 8))
    core = expit(-distance / edge)
    surrounding = np.average(level, weights=np.exp(-((distance / 0.05) ** 2)) + 1e-6)
    level = level + 0.9 * core * (surrounding - drop + mottle * canvas.noise(0.03, 0.035) - level)
    if malignant:
        level += random.uniform(1, 6) * np.exp(-((np.maximum(distance, 0) / 0.035) ** 2)) * (1 - core)  # halo
        for _ in range(random.integers(0, 7)):  # microcalcifications
            dx = canvas.x - centre[0] - random.normal(0, half_axes[0] / 3)
            dy = canvas.y - centre[1] - random.normal(0, half_axes[1] / 3)
            level += random.uniform(6, 14) * np.exp(-(dx**2 + dy**2) / 0.006**2)
    else:
        level += random.uniform(2, 8) * np.exp(-((distance / 0.007) ** 2))  # rim
    return level + _below_lesion(canvas, centre, half_axes, cast, malignant) * (1 - 0.7 * core), distance < 0


def _below_lesion(
    canvas: _Canvas, centre: tuple[float, float], half_axes: tuple[float, float], cast: float, malignant: bool
) -> np.ndarray:
    """Draw the change [size,size] in dB below a lesion: enhancement (`cast` > 0) or shadow, edge shadows if benign."""
    offset, depth = np.abs(canvas.x - centre[0]) / half_axes[0], canvas.y - centre[1]
    beam = expit((0.75 - offset) / 0.13) * expit((depth - 0.5 * half_axes[1]) / 0.06)
    ragged = np.clip(1 + 0.3 * canvas.noise(0.3, 0.03), 0.3, 1.7)
    if malignant:
        return cast * beam * ragged
    flanks = np.exp(-(((offset - 1) / 0.08) ** 2)) * expit(depth / 0.02)
    fade = np.exp(-np.maximum(depth - half_axes[1], 0) / 0.2)
    return (cast * beam * ragged - canvas.random.uniform(0, 6) * flanks) * fade


def _depth_and_contact(canvas: _Canvas) -> np.ndarray:
    """Draw the change [size,size] in dB by attenuation beyond the focus, poor contact at a side, ligament shadows."""
    random, x, y = canvas.random, canvas.x, canvas.y
    focus = random.uniform(0.3, 0.6)
    change = -random.uniform(8, 55) * np.maximum(y - focus, 0) ** 1.3 - 3 * np.abs(y - focus) + 0 * x
    if random.random() < 0.3:
        side = x if random.random() < 0.5 else 1 - x
        change -= random.uniform(8, 28) * expit((random.uniform(0, 0.2) + 0.05 * y - side) / 0.025)
    for _ in range(random.integers(0, 4)):
        slope, start = random.uniform(-0.15, 0.15), random.uniform(0.08, 0.5)
        across = (x - random.uniform(0, 1) - slope * y) / random.uniform(0.015, 0.06)
        change -= random.uniform(2, 9) * np.exp(-(across**2)) * expit((y - start) / 0.04)
    return change


def _speckle(canvas: _Canvas) -> np.ndarray:
    """Draw log-compressed Rayleigh speckle [size,size] in dB; scanners average two to four looks."""
    axial, lateral = canvas.random.uniform(0.0035, 0.0055), canvas.random.uniform(0.006, 0.011)
    looks = canvas.random.integers(2, 5)
    intensity = np.sum([canvas.noise(axial, lateral) ** 2 for _ in range(2 * looks)], axis=0) / looks
    return 10 * np.log10(intensity + 0.02)


def _shift_columns(field: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Move each column of `field` [size,size] down by `shift` [1,size] image heights, with periodic boundaries."""
    rows, columns = np.indices(field.shape)
    return map_coordinates(field, [rows - shift * len(field), columns], order=1, mode="grid-wrap")


def _above(boundary: np.ndarray, y: np.ndarray, softness: float) -> np.ndarray:
    """Return 1 above (shallower than) the boundary and 0 below it, with a soft transition."""
    return expit((boundary - y) / softness)
