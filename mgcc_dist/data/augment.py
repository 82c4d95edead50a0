"""Augmentation of the paper (section IV-B) and its released code: rotation by multiples of 90 degrees, and flips.

Together these are the eight symmetries of the square. They are exact: no pixel is interpolated. The paper does not say
how often each is drawn: `symmetries` draws all equally, `released` as the released code does. Counting mirrored images
with the others:

             upright   upside down   on their side
symmetries   25 %      25 %          50 %
released     45.8 %    29.2 %        25 %
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


def draw_released_symmetry(seed: int, stream: int, offset: int) -> int:
    """Draw one of 0..7 with the probabilities of the released code, as a pure function of seed, stream and offset.

    Source: Albumentations' RandomRotate90, which turns half of the images by 0 to 3 quarter turns, then Flip, which
    flips half of them: horizontally, vertically or both.
    """
    random = np.random.default_rng((seed, stream, offset))
    turns = random.integers(4) if random.random() < 0.5 else 0
    flip = random.integers(1, 4) if random.random() < 0.5 else 0
    half_turn, mirrored = (0, 0, 2, 2)[flip], (0, MIRROR, MIRROR, 0)[flip]
    return int((turns + half_turn) % 4 + mirrored)
