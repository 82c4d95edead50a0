"""Augmentation of the paper (section IV-B) and its released code: rotation by multiples of 90 degrees, and flips.

Together these are the eight symmetries of the square. They are exact: no pixel is interpolated, no mask value made up.
"""

import numpy as np

SYMMETRIES = 8
MIRROR = 4  # left and right exchanged; up stays up


def symmetry(square: np.ndarray, which: int) -> np.ndarray:
    """View of `square` [S,S] under symmetry `which` of 0..7: `which % 4` quarter turns, then from 4 on a mirror."""
    turned = np.rot90(square, which % 4)
    return turned[:, ::-1] if which >= 4 else turned


def draw_symmetry(seed: int, stream: int, place: int) -> int:
    """One of 0..7, each as likely; a pure function of the sample's place in its stream."""
    return int(np.random.default_rng((seed, stream, place)).integers(SYMMETRIES))
