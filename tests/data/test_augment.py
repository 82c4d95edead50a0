from collections import Counter

import numpy as np

from mgcc_dist.data.augment import SYMMETRIES, draw_symmetry, symmetry


def test_the_eight_symmetries_are_all_different_and_keep_every_pixel():
    square = np.arange(16).reshape(4, 4)
    seen = {symmetry(square, which).tobytes() for which in range(SYMMETRIES)}
    assert len(seen) == 8
    assert all(sorted(symmetry(square, which).ravel()) == list(range(16)) for which in range(SYMMETRIES))
    np.testing.assert_array_equal(symmetry(square, 0), square)


def test_quarter_turns_and_mirrors_close_under_each_other():
    """Doing any two one after the other is one of the eight again."""
    square = np.arange(9).reshape(3, 3)
    eight = {symmetry(square, which).tobytes() for which in range(SYMMETRIES)}
    pairs = [symmetry(symmetry(square, a), b).tobytes() for a in range(SYMMETRIES) for b in range(SYMMETRIES)]
    assert set(pairs) == eight


def test_all_symmetries_are_drawn_about_as_often():
    counts = Counter(draw_symmetry(0, 0, place) for place in range(4000))
    assert sorted(counts) == list(range(8))
    assert all(400 < count < 600 for count in counts.values())


def test_a_draw_depends_on_seed_stream_and_place_and_on_nothing_else():
    def draws(seed, stream):
        return [draw_symmetry(seed, stream, place) for place in range(50)]

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(seed, stream)) for seed in (1, 2) for stream in (0, 1)}) == 4
