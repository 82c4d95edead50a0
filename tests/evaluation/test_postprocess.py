"""What each setting removes, how settings are written, and that `choose` finds the best."""

import numpy as np
import pytest

from mgcc_dist.common.errors import UserError
from mgcc_dist.evaluation.metrics import score_image
from mgcc_dist.evaluation.postprocess import SETTINGS, Postprocess, choose, parse, setting_scores


def draw(*rectangles):
    mask = np.zeros((40, 50), bool)
    for top, left, height, width in rectangles:
        mask[top : top + height, left : left + width] = True
    return mask


LARGE, SMALL, DOT = (5, 5, 15, 15), (25, 30, 5, 6), (2, 45, 1, 1)


def test_each_setting_removes_what_it_names():
    mask = draw(LARGE, SMALL, DOT)
    mask[10, 10] = False
    np.testing.assert_array_equal(Postprocess()(mask), mask)
    filled = draw(LARGE, SMALL, DOT)
    np.testing.assert_array_equal(Postprocess(fill=True)(mask), filled)
    np.testing.assert_array_equal(Postprocess(min_area=0.01)(filled), draw(LARGE, SMALL))
    np.testing.assert_array_equal(Postprocess(largest=True)(filled), draw(LARGE))
    assert not Postprocess(min_area=0.2)(filled).any()
    assert not Postprocess(min_area=0.2, largest=True)(filled).any()
    assert not Postprocess(True, 0.01, True)(draw()).any()


def test_components_that_touch_at_a_corner_are_two():
    mask = draw((0, 0, 4, 4), (4, 4, 3, 3))
    np.testing.assert_array_equal(Postprocess(largest=True)(mask), draw((0, 0, 4, 4)))


def test_settings_are_read_as_they_are_written():
    for setting in SETTINGS:
        assert parse(str(setting)) == setting
    assert parse("largest, fill") == Postprocess(fill=True, largest=True)
    assert str(SETTINGS[0]) == "none"


@pytest.mark.parametrize("words", ["bigest", "min", "min=2", "min=x", "fill=1", "fill,,largest", "out/eval"])
def test_an_unknown_word_is_an_error(words):
    with pytest.raises(UserError, match=r"^--postprocess .* is not one of fill, min=SHARE, largest"):
        parse(words)


def test_scores_of_settings_equal_those_of_the_masks():
    rng = np.random.default_rng(0)
    for share in (0, 0.1, 0.4, 0.6):
        mask, truth = (np.kron(rng.random((8, 10)) < each, np.ones((5, 5))) > 0 for each in (share, 0.3))
        expected = [score_image(setting(mask), truth, surface=False)["corrected"]["iou"] for setting in SETTINGS]
        assert setting_scores(mask, truth) == pytest.approx(expected)


def test_choose_takes_the_best_setting_and_none_unless_another_is_better():
    alarms = [(draw(LARGE, SMALL), draw(LARGE)), (draw(SMALL), draw())]
    chosen = choose(setting_scores(*each) for each in alarms)
    assert chosen.min_area * 2000 > 30  # the area of SMALL
    assert choose([setting_scores(draw(LARGE), draw(LARGE))]) == Postprocess()
