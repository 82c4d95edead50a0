"""Summaries agree with the scores of training runs; subsets partition the images."""

import numpy as np
import pytest

from mgcc_dist.data.sample import Sample
from mgcc_dist.evaluation.cases import choose_cases
from mgcc_dist.evaluation.metrics import score_image
from mgcc_dist.evaluation.metrics import summarize as summarize_scores
from mgcc_dist.evaluation.summary import METRICS, NAMES, add_sizes, summarize, summarize_subsets
from mgcc_dist.inference.evaluation import image_row, surface_row


def sample(rng, number, spacing=None):
    mask = np.zeros((24, 30), np.uint8)
    if number % 4:
        top, left, side = rng.integers(0, 12, 3)
        mask[top : top + side + 3, left : left + side + 3] = 255
    category = ("normal", "benign", "malignant", "benign")[number % 4]
    meta = {"dataset": "toy", "class": category, "group": f"g{number // 2}", "original_size": [60, 24]}
    if spacing:
        meta |= {"pixel_spacing": spacing, "device": f"scanner {number % 2}"}
    return Sample(f"image {number:02d}", np.zeros((24, 30), np.uint8), mask, meta)


@pytest.fixture(scope="module")
def scored():
    rng = np.random.default_rng(0)
    scored = []
    for number in range(40):
        each = sample(rng, number, [0.25, 0.5])
        probability = np.clip((each.mask > 0) * 0.6 + rng.random((24, 30)) * 0.51, 0, 1).astype(np.float32)
        probability = probability * np.float32(number % 7 > 0)
        mask = probability > 0.5
        scored.append((each, image_row(each, probability, mask) | surface_row(each, mask, 2.0), mask))
    return scored


@pytest.fixture
def rows(scored):
    rows = [dict(row) for _, row, _ in scored]
    add_sizes(rows)
    return rows


def test_means_equal_those_of_a_training_run(scored, rows):
    expected = summarize_scores([score_image(mask, each.mask > 0, surface=True) for each, _, mask in scored])
    summary = summarize(rows)
    for protocol in ("corrected", "lesion", "paper"):
        for name, value in expected[protocol].items():
            assert summary[protocol][NAMES.get(name, name)]["mean"] == pytest.approx(value)
    for name in ("specificity", "hd95", "asd", "hd95_penalized", "asd_penalized"):
        assert summary[NAMES.get(name, name)]["mean"] == pytest.approx(expected[name])
    assert summary["hd95"]["images"] == expected["surfaces"]
    assert (summary["images"], summary["lesions"], summary["groups"]) == (40, 30, 20)


def test_intervals_enclose_their_mean_and_stay_in_its_range(rows):
    summary = summarize(rows)
    for metric in METRICS:
        mean = summary
        for name in metric.path:
            mean = mean[name]
        assert mean["low"] <= mean["mean"] <= mean["high"]
        assert mean["low"] >= 0
        assert mean["high"] <= 1 or not metric.bounded


def test_false_alarms_are_those_of_images_without_lesion(rows):
    summary = summarize(rows)
    normals = [row for row in rows if row["class"] == "normal"]
    assert summary["specificity"]["images"] == summary["false_alarm_area"]["images"] == len(normals) == 10
    assert summary["specificity"]["mean"] == np.mean([row["predicted_area"] == 0 for row in normals])
    assert summary["false_alarm_area"]["mean"] == pytest.approx(np.mean([row["predicted_area"] for row in normals]))


def test_subsets_partition_the_images_that_have_the_column(rows):
    subsets = summarize_subsets(rows)
    counts = {}
    for subset in subsets:
        counts.setdefault(subset["by"], []).append(subset["images"])
    assert {by: sum(numbers) for by, numbers in counts.items()} == {"class": 40, "lesion size": 30, "device": 40}
    assert max(counts["lesion size"]) - min(counts["lesion size"]) <= 6  # some lesions are of equal size
    ends = [subset["lesion_area"] for subset in subsets if subset["by"] == "lesion size"]
    assert ends[0][1] < ends[1][0] <= ends[1][1] < ends[2][0]


def test_a_column_with_one_value_or_none_makes_no_subset(rows):
    alike = [row | {"class": "benign", "device": None} for row in rows]
    assert {subset["by"] for subset in summarize_subsets(alike)} == {"lesion size"}


def test_millimetres_follow_the_stored_size():
    """Stored at half of its width: 0.25 mm become 0.5 mm there, and 0.5 mm stay."""
    rng = np.random.default_rng(1)
    each = sample(rng, 1, [0.25, 0.5])
    row = surface_row(each, np.roll(each.mask > 0, 2, axis=1), 2.0)
    assert row["assd_mm"] == pytest.approx(row["assd"] / 2)
    assert surface_row(sample(rng, 1), each.mask > 0, 2.0)["hd95_mm"] is None


def test_cases_are_chosen_by_the_rule_and_each_is_shown_once(rows):
    cases = choose_cases(rows)
    keys = [row["key"] for _, row in cases]
    assert len(set(keys)) == len(keys) <= 10
    lesions = [row for row in rows if row["lesion"]]
    by_name = dict(cases)
    assert by_name["worst"]["dice"] == min(row["dice"] for row in lesions)
    assert by_name["best"]["dice"] == max(row["dice"] for row in lesions)
    assert by_name["no lesion, empty"]["predicted_area"] == 0
    alarms = [row["predicted_area"] for row in rows if not row["lesion"]]
    assert by_name["largest false alarm"]["predicted_area"] == max(alarms)
    assert [why for why, _ in choose_cases(rows[:1])] == ["no lesion, empty"]
