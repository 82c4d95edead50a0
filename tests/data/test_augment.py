from collections import Counter

import numpy as np

from mgcc_dist.data.augment import SYMMETRIES, draw_released_symmetry, draw_symmetry, symmetry


def test_the_eight_symmetries_are_distinct_and_permute_pixels():
    square = np.arange(16).reshape(4, 4)
    seen = {symmetry(square, index).tobytes() for index in range(SYMMETRIES)}
    assert len(seen) == 8
    assert all(sorted(symmetry(square, index).ravel()) == list(range(16)) for index in range(SYMMETRIES))
    np.testing.assert_array_equal(symmetry(square, 0), square)


def test_the_symmetries_are_closed_under_composition():
    square = np.arange(9).reshape(3, 3)
    eight = {symmetry(square, index).tobytes() for index in range(SYMMETRIES)}
    pairs = [symmetry(symmetry(square, a), b).tobytes() for a in range(SYMMETRIES) for b in range(SYMMETRIES)]
    assert set(pairs) == eight


def test_symmetries_are_drawn_uniformly():
    counts = Counter(draw_symmetry(0, 0, offset) for offset in range(4000))
    assert sorted(counts) == list(range(8))
    assert all(400 < count < 600 for count in counts.values())


def test_the_released_code_leaves_more_images_upright():
    """Albumentations' RandomRotate90(p=0.5), then Flip(p=0.5), in exact probabilities."""
    arrow = np.array([[1, 2], [1, 3]])
    exact = Counter()
    for turns, turned in [(0, 5 / 8), (1, 1 / 8), (2, 1 / 8), (3, 1 / 8)]:
        rotated = np.rot90(arrow, turns)
        flips = [(rotated, 1 / 2), (rotated[:, ::-1], 1 / 6), (rotated[::-1], 1 / 6), (rotated[::-1, ::-1], 1 / 6)]
        for view, flipped in flips:
            exact[view.tobytes()] += turned * flipped
    indices = {symmetry(arrow, index).tobytes(): index for index in range(SYMMETRIES)}
    expected = {indices[view]: share for view, share in exact.items()}
    drawn = Counter(draw_released_symmetry(0, 0, offset) for offset in range(8000))
    for index in range(SYMMETRIES):
        assert abs(drawn[index] / 8000 - expected[index]) < 0.015
    upright, on_side = expected[0] + expected[4], sum(expected[index] for index in (1, 3, 5, 7))
    assert (round(upright, 3), round(on_side, 3)) == (0.458, 0.25)


def test_a_draw_is_a_function_of_seed_stream_and_offset():
    def draws(seed, stream):
        return [draw_symmetry(seed, stream, offset) for offset in range(50)]

    assert draws(1, 0) == draws(1, 0)
    assert draw_released_symmetry(3, 1, 7) == draw_released_symmetry(3, 1, 7)
    assert len({tuple(draws(seed, stream)) for seed in (1, 2) for stream in (0, 1)}) == 4
