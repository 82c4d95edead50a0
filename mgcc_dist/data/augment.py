"""Augmentation of the paper (section IV-B) and its released code: rotation by multiples of 90 degrees, and flips.

Together these are the eight symmetries of the square. They are exact: no pixel is interpolated.
"""

import numpy as np

SYMMETRIES = 8
MIRROR = 4  # horizontal flip without rotation


def symmetry(image: np.ndarray, index: int) -> np.ndarray:
    """View `image` [S,S] under symmetry 0..7: `index % 4` quarter turns, then a horizontal flip from 4 on."""
    rotated = np.rot90(image, index % 4)
    return rotated[:, ::-1] if index >= 4 else rotated


def draw_symmetry(seed: int, stream: int, offset: int) -> int:
    """Draw one of 0..7 uniformly, as a pure function of seed, stream and sample offset."""
    return int(np.random.default_rng((seed, stream, offset)).integers(SYMMETRIES))
