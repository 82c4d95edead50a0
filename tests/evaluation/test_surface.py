"""Surface metrics equal MONAI's; what counts when a mask is empty; pixel spacing."""

import math
import warnings

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

from mgcc_dist.evaluation.surface import surface_scores


def mask(rows, columns, shape=(20, 30)):
    drawn = np.zeros(shape, bool)
    drawn[rows, columns] = True
    return drawn


TRUTH, EMPTY = mask(slice(5, 15), slice(5, 15)), np.zeros((20, 30), bool)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.3, 0.3), (0.2, 0.5)])
def test_hd95_assd_and_nsd_equal_monai(spacing):
    rng = np.random.default_rng(4)
    for _ in range(15):
        predicted, truth = (rng.random((13, 17)) < rng.uniform(0.1, 0.6) for _ in range(2))
        pair = [torch.from_numpy(each)[None, None].float() for each in (predicted, truth)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            expected = {
                "hd95": compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing),
                "asd": compute_average_surface_distance(
                    *pair, include_background=True, symmetric=True, spacing=spacing
                ),
                "nsd": compute_surface_dice(*pair, class_thresholds=[0.6], include_background=True, spacing=spacing),
            }
        scores = surface_scores(predicted, truth, 0.6, spacing)
        assert {name: scores[name] for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()})


def test_distances_are_in_mm_along_both_axes():
    down, right = mask(slice(7, 17), slice(5, 15)), mask(slice(5, 15), slice(7, 17))
    assert surface_scores(down, TRUTH, 2, (0.5, 3.0))["hd95"] == 1.0
    assert surface_scores(right, TRUTH, 2, (3.0, 0.5))["hd95"] == 1.0


def test_nsd_counts_the_contour_within_the_tolerance():
    moved = mask(slice(5, 15), slice(7, 17))
    assert surface_scores(moved, TRUTH, 2)["nsd"] == 1
    assert 0 < surface_scores(moved, TRUTH, 1)["nsd"] < 1
    assert surface_scores(TRUTH, TRUTH, 0)["nsd"] == 1


def test_a_missed_lesion_is_the_worst_score_and_an_image_without_lesion_has_none():
    missed = surface_scores(EMPTY, TRUTH, 2, (0.5, 0.5))
    assert missed == {
        "hd95": None,
        "asd": None,
        "hd95_penalized": pytest.approx(0.5 * math.hypot(20, 30)),
        "asd_penalized": pytest.approx(0.5 * math.hypot(20, 30)),
        "nsd": 0,
    }
    for predicted in (EMPTY, TRUTH):
        assert set(surface_scores(predicted, EMPTY, 2).values()) == {None}
