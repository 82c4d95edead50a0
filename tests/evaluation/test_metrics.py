"""The three protocols on hand-made cases and against pixel-by-pixel counting."""

import json

import numpy as np
import pytest
import torch
from monai.metrics import compute_confusion_matrix_metric, compute_dice, compute_iou, get_confusion_matrix

from mgcc_dist.evaluation.metrics import score_image, summarize

NAMES = ("iou", "recall", "precision", "f1")
EMPTY = np.zeros((16, 16), bool)
FULL = np.ones((16, 16), bool)
DIAGONAL = 16 * 2**0.5


def square(top, left, size=6):
    mask = EMPTY.copy()
    mask[top : top + size, left : left + size] = True
    return mask


def values(scores):
    return [scores[name] for name in NAMES]


@pytest.mark.parametrize(
    ("predicted", "truth", "paper", "corrected"),
    [
        pytest.param(EMPTY, EMPTY, [1, 0, 0, 0], [1, 1, 1, 1], id="normal, rightly empty"),
        pytest.param(square(3, 3, 1), EMPTY, [0, 0, 1, 0], [0, 0, 0, 0], id="normal, one false pixel"),
        pytest.param(FULL, EMPTY, [0, 1, 1, 1], [0, 0, 0, 0], id="normal, predicted all foreground"),
        pytest.param(square(3, 3), square(3, 3), [1, 1, 1, 1], [1, 1, 1, 1], id="lesion, perfect"),
        pytest.param(EMPTY, square(3, 3), [0, 0, 0, 0], [0, 0, 0, 0], id="lesion, missed"),
        pytest.param(FULL, FULL, [1, 1, 1, 1], [1, 1, 1, 1], id="lesion fills the image"),
    ],
)
def test_protocols_on_the_cases_where_they_differ(predicted, truth, paper, corrected):
    scores = score_image(predicted, truth, surface=False)
    # "normal, one false pixel": the released code's recall is 1 pixel of 256, which a mask of full size rounds to 0
    assert values(scores["paper"]) == pytest.approx(paper, abs=0.01)
    assert values(scores["corrected"]) == corrected
    assert scores["lesion"] == (scores["corrected"] if truth.any() else None)


def test_all_protocols_equal_pixel_by_pixel_counting_on_random_masks():
    rng = np.random.default_rng(5)
    seen_empty = 0
    for _ in range(1000):
        shape = rng.integers(1, 8, 2)
        predicted, truth = (rng.random(shape) < rng.choice([0, 0.05, 0.5, 0.95, 1]) for _ in range(2))
        seen_empty += not truth.any()
        scores = score_image(predicted, truth, surface=False)
        assert scores["paper"] == _released_code(predicted.tolist(), truth.tolist())  # to the bit
        assert values(scores["corrected"]) == pytest.approx(_by_definition(predicted.tolist(), truth.tolist()))
        assert scores["predicted_empty"] == (sum(map(sum, predicted.tolist())) == 0)
    assert 200 < seen_empty < 800


def _count(predicted, truth):
    pairs = [(p, t) for p_row, t_row in zip(predicted, truth, strict=True) for p, t in zip(p_row, t_row, strict=True)]
    return pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))


def _released_code(predicted, truth):
    tp, fp, fn = _count(predicted, truth)
    iou = (tp + 1e-5) / (tp + fp + fn + 1e-5)
    if not any(map(any, truth)):  # all pixels equal the highest value, so all are taken as foreground
        tp, fp, fn = _count(predicted, [[True] * len(row) for row in truth])
    recall, precision = float(tp) / (float(tp + fn) + 1e-6), float(tp) / (float(tp + fp) + 1e-6)
    f1 = 2 * recall * precision / (recall + precision + 1e-6)
    return {"iou": iou, "recall": recall, "precision": precision, "f1": f1}


def _by_definition(predicted, truth):
    tp, fp, fn = _count(predicted, truth)
    if tp + fp + fn == 0:
        return [1, 1, 1, 1]
    if tp == 0:
        return [0, 0, 0, 0]
    recall, precision = tp / (tp + fn), tp / (tp + fp)
    return [tp / (tp + fp + fn), recall, precision, 2 * recall * precision / (recall + precision)]


def test_summary_averages_each_protocol_over_its_own_images():
    images = [
        score_image(square(3, 3), square(3, 3), surface=False),  # lesion found
        score_image(EMPTY, square(3, 3), surface=False),  # lesion missed
        score_image(EMPTY, EMPTY, surface=False),  # normal, empty
        score_image(square(0, 0), EMPTY, surface=False),  # normal, false alarm
        score_image(EMPTY, EMPTY, surface=False),
    ]
    summary = summarize(images)
    assert values(summary["corrected"]) == pytest.approx([0.6] * 4)
    assert values(summary["lesion"]) == pytest.approx([0.5] * 4)
    assert summary["specificity"] == pytest.approx(2 / 3)
    assert (summary["images"], summary["lesions"]) == (5, 2)
    assert summary["paper"]["iou"] == pytest.approx(0.6, abs=1e-4)
    assert summary["paper"]["precision"] == pytest.approx((1 + 0 + 0 + 1 + 0) / 5, abs=1e-4)
    assert "hd95" not in summary


def test_summary_has_none_where_there_is_no_image_to_average():
    assert summarize([score_image(EMPTY, square(1, 1), surface=True)]) | {"paper": 0, "corrected": 0, "lesion": 0} == {
        "paper": 0,
        "corrected": 0,
        "lesion": 0,
        "specificity": None,
        "images": 1,
        "lesions": 1,
        "hd95": None,
        "asd": None,
        "surfaces": 0,
        "hd95_penalized": pytest.approx(DIAGONAL),
        "asd_penalized": pytest.approx(DIAGONAL),
    }
    assert summarize([score_image(EMPTY, EMPTY, surface=False)])["lesion"] is None


def test_surface_distances_are_in_pixels_and_none_if_a_mask_is_empty():
    moved = score_image(square(3, 3), square(3, 7), surface=True)
    assert moved["hd95"] == pytest.approx(4.0)
    assert score_image(square(3, 3), square(3, 3), surface=True)["asd"] == 0.0
    for predicted, truth in ((EMPTY, square(1, 1)), (square(1, 1), EMPTY), (EMPTY, EMPTY)):
        scores = score_image(predicted, truth, surface=True)
        assert scores["hd95"] is None
        assert scores["asd"] is None


def test_surface_distances_equal_brute_force_over_edge_pixels():
    rng = np.random.default_rng(1)
    compared = 0
    for _ in range(40):
        predicted, truth = (rng.random((12, 9)) < rng.uniform(0.1, 0.9) for _ in range(2))
        if not (predicted.any() and truth.any()):
            continue
        ours, theirs = _edge_pixels(predicted), _edge_pixels(truth)
        between = np.linalg.norm(ours[:, None] - theirs[None], axis=-1)
        there, back = between.min(1), between.min(0)
        scores = score_image(predicted, truth, surface=True)
        assert scores["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
        assert scores["asd"] == pytest.approx(np.concatenate((there, back)).mean(), rel=1e-5)
        compared += 1
    assert compared > 30


def test_overlap_metrics_equal_monai():
    """MONAI gives NaN where an image has no lesion; all other cases are equal."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        predicted, truth = (rng.random((12, 9)) < rng.uniform(0, 0.9) for _ in range(2))
        truth[0, 0] = True
        pair = [torch.from_numpy(mask)[None, None].float() for mask in (predicted, truth)]
        counts = get_confusion_matrix(*pair)
        expected = {
            "iou": compute_iou(*pair),
            "f1": compute_dice(*pair),
            "recall": compute_confusion_matrix_metric("recall", counts),
            "precision": compute_confusion_matrix_metric("precision", counts).nan_to_num(0),
        }
        scores = score_image(predicted, truth, surface=False)["corrected"]
        assert scores == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-6)


def _edge_pixels(mask):
    """Foreground pixels with a background pixel or the image border as 4-neighbour."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inner)


def test_mean_distance_is_over_the_images_where_it_is_defined():
    images = [score_image(square(3, 3), square(3, 5), surface=True), score_image(EMPTY, square(3, 3), surface=True)]
    summary = summarize(images)
    assert summary["hd95"] == images[0]["hd95"]
    assert summary["surfaces"] == 1


def test_a_missed_lesion_costs_the_image_diagonal_in_the_penalized_distances():
    """Without the penalty, one exact hit and nine misses are as good as ten exact hits."""
    hit, miss = (score_image(predicted, square(3, 3), surface=True) for predicted in (square(3, 3), EMPTY))
    no_lesion = [score_image(predicted, EMPTY, surface=True) for predicted in (EMPTY, square(1, 1))]
    summary = summarize([hit, *[miss] * 9, *no_lesion])
    assert (summary["hd95"], summary["asd"], summary["surfaces"], summary["lesions"]) == (0.0, 0.0, 1, 10)
    assert summary["hd95_penalized"] == pytest.approx(0.9 * DIAGONAL)
    assert summary["asd_penalized"] == pytest.approx(0.9 * DIAGONAL)
    moved = score_image(square(3, 3), square(3, 7), surface=True)
    assert (moved["hd95_penalized"], moved["asd_penalized"]) == (moved["hd95"], moved["asd"])


def test_scores_and_summary_are_plain_json_without_nan():
    images = [score_image(p, t, surface=True) for p in (EMPTY, square(2, 2)) for t in (EMPTY, square(2, 4))]
    json.dumps([images, summarize(images)], allow_nan=False)
