from collections import Counter

import numpy as np

from mgcc_dist.data.augment import SYMMETRIES, draw_symmetry, symmetry


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


def test_a_draw_is_a_function_of_seed_stream_and_offset():
    def draws(seed, stream):
        return [draw_symmetry(seed, stream, offset) for offset in range(50)]

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(seed, stream)) for seed in (1, 2) for stream in (0, 1)}) == 4
