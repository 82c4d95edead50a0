"""The report's sections that compare runs: known values of made-up results."""

import csv
import json
import statistics

import numpy as np
import pytest
from made_up_runs import fold_images, image, make, make_folds, rows_of, texts

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.data.splits import locate_split
from mgcc_dist.evaluation.statistics import mean_intervals
from mgcc_dist.report import main as report
from mgcc_dist.reporting.image_scores import find_evaluations
from mgcc_dist.reporting.labels import name_groups
from mgcc_dist.reporting.runs import RunCollection, find_runs, group_runs
from mgcc_dist.reporting.sections import cross_set, differences, folds, label_fractions, ranks, synthetic
from mgcc_dist.reporting.views import NO_VALUE


def test_folds_are_pooled_over_images_and_averaged_over_folds(tmp_path):
    """Folds of 2 and 20 images: the pooled mean weighs images, the mean over folds weighs folds."""
    values = [0.2, 0.4, *np.random.default_rng(0).uniform(0.5, 0.9, 20)]
    small, large = fold_images(1, values[:2]), fold_images(2, values[2:])
    make(tmp_path / "a", "unet", "busi_fold_1", small)
    make(tmp_path / "b", "unet", "busi_fold_2", large)
    section = folds.section(rows_of(tmp_path))
    view = section.tables[0]
    assert view.caption == "IoU: busi, busi_fold, 22 images of 11 groups, each in one split"
    pooled, over, first, second = dict(view.rows)["supervised (unet)"]
    means = [30, 100 * statistics.mean(values[2:])]
    assert pooled.text == f"{100 * statistics.mean(values):.1f}"
    assert over.text == f"{statistics.mean(means):.2f} ± {statistics.stdev(means):.2f}"
    assert (first.text, second.text) == ("30.0", f"{means[1]:.1f}")
    (expected,) = mean_intervals(np.array(values)[:, None], [f"busi/{each['group']}" for each in small + large], [True])
    assert pooled.note == f"{100 * expected.low:.1f} to {100 * expected.high:.1f}"
    assert first.note == ""  # one group
    assert view.runs == {"supervised (unet)": "a, b"}


def test_images_in_several_splits_are_counted(tmp_path):
    for number in (1, 2):
        make(tmp_path / f"{number}", "unet", f"busi_test_{number}", [image("same", 0.5), image(f"own {number}", 0.7)])
    assert "3 images of 3 groups, 1 of them in several splits" in folds.section(rows_of(tmp_path)).tables[0].caption


def test_seeds_of_one_split_are_no_folds(tmp_path):
    for seed in (1, 2):
        make(tmp_path / f"{seed}", "unet", "busi_test_1", [image("a", 0.1 * seed)], seed=seed)
    assert folds.section(rows_of(tmp_path)) is None


def test_results_without_groups_say_what_their_intervals_resample(tmp_path):
    for fold in (1, 2):
        images = [
            {key: value for key, value in each.items() if key != "group"} for each in fold_images(fold, [0.5] * 12)
        ]
        make(tmp_path / f"{fold}", "unet", f"busi_fold_{fold}", images)
    section = folds.section(rows_of(tmp_path))
    assert any("resamples single images" in line for line in section.legend)
    assert "24 groups" in section.tables[0].caption


def test_matrix_of_trained_on_by_tested_on(tmp_path):
    own = [image("a", 0.8), image("normal", 1.0, lesion=False)]
    make(tmp_path / "busi", "unet", "busi_test_1", own, external={"busbra": [image("x", 0.5), image("y", 0.7)]})
    make(tmp_path / "bra", "unet", "bra_1", [image("x", 0.9)], dataset="busbra", external={"busi": [image("a", 0.3)]})
    section = cross_set.section(rows_of(tmp_path), [])
    iou, _dice, lesion_iou, specificity = section.tables + section.details
    assert [view.caption for view in section.tables] == ["IoU", "lesion Dice"]
    assert iou.column_groups == [
        ("", ["trained on"]),
        ("busbra", ["all images, 64 px", "test part, 64 px"]),
        ("busi", ["all images, 64 px", "test part, 64 px"]),
    ]
    none = "–"  # noqa: RUF001
    assert texts(iou, "supervised (unet), busi_test") == ["busi", "60.0", none, none, "90.0"]
    assert texts(iou, "supervised (unet), bra") == ["busbra", none, "90.0", "30.0", none]
    assert texts(lesion_iou, "supervised (unet), busi_test")[-1] == "80.0"
    assert [cell.shaded for cell in dict(iou.rows)["supervised (unet), bra"]] == [False, True, True, False, False]
    assert specificity.column_groups[1:] == [("busi", ["test part, 64 px"])]  # no other set has normal images


def test_runs_tested_only_on_their_own_data_set_give_no_matrix(tmp_path):
    make(tmp_path / "a", "unet", "busi_test_1", [image("a", 0.8)])
    assert cross_set.section(rows_of(tmp_path), []) is None


def make_evaluation(folder, weights, rows, **request):
    folder.mkdir()
    (folder / "evaluate.json").write_text("{}")
    info = {"weights": "gone/best/model.safetensors", "method": "supervised", "network": {"name": "unet"}}
    summary = {
        "format": "mgcc-dist evaluation",
        "version": 1,
        "config": {"weights": "best"},
        "request": {"size": None, "tta": [], "subset": None} | request,
        "postprocess": {"setting": "none"},
        "runs": [info | {"dataset": "busi", "weights_sha256": sha256_of(weights)}],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "images.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_evaluations_join_the_row_of_their_weights(tmp_path):
    run = make(tmp_path / "run", "unet", "busi_test_1", [image("a", 0.8)])
    (run / "best").mkdir()
    weights = run / "best" / "model.safetensors"
    weights.write_bytes(b"weights")
    scores = {"iou": 0.5, "dice": 0.6, "recall": 0.7, "precision": 0.8, "predicted_area": 0.1}
    rows = [{"dataset": "busbra", "key": f"{i}", "group": f"{i // 2}", "lesion": 1, **scores} for i in range(30)]
    rows[0]["iou"] = 0.8
    make_evaluation(tmp_path / "evaluation", weights, rows)
    make_evaluation(tmp_path / "flipped", weights, rows, tta=["flips"])
    section = cross_set.section(rows_of(tmp_path), find_evaluations([tmp_path, tmp_path / "flipped"], RunCollection()))
    view = section.tables[0]
    assert view.column_groups[1:] == [
        ("busbra", ["all images, stored size", "all images, stored size, tta flips"]),
        ("busi", ["test part, 64 px"]),
    ]
    ((label, cells),) = view.rows
    assert label == "supervised (unet)"
    assert cells[1].text == "51.0"
    assert cells[1].note
    assert view.runs == {label: "run"}


def test_methods_are_ranked_over_the_splits_that_they_share(tmp_path):
    make_folds(tmp_path, {"unet": 0.5, "mt": 0.6, "mgcc": 0.7})
    make(tmp_path / "cps", "cps", "busi_fold_1", fold_images(1, [0.9] * 13))  # one block only
    section = ranks.section(rows_of(tmp_path))
    view = section.tables[0]
    assert [(label, cells[0].text) for label, cells in view.rows] == [
        ("mgcc", "1.00"),
        ("mean_teacher (unet)", "2.00"),
        ("supervised (unet)", "3.00"),
    ]
    assert "5 blocks: busi_fold_1, busi_fold_2, busi_fold_3, busi_fold_4, busi_fold_5" in view.caption
    assert "Friedman p = 0.00674" in view.caption  # exp(-5): all blocks agree
    assert "critical difference 1.48" in view.caption
    assert "mgcc 1.00, mean_teacher (unet) 2.00" in section.pictures[0].alt


def test_too_few_methods_or_splits_are_not_ranked(tmp_path):
    make_folds(tmp_path / "two", {"unet": 0.5, "mt": 0.6})
    make_folds(tmp_path / "four", {"unet": 0.5, "mt": 0.6, "mgcc": 0.7}, folds=4)
    assert ranks.section(rows_of(tmp_path / "two")) is None
    assert ranks.section(rows_of(tmp_path / "four")) is None


def test_learning_curves_join_runs_that_differ_only_in_their_labels(tmp_path):
    test = [image(f"t{i}", 0.5) for i in range(4)]
    counts = {"busi_test_1": 281, "busi_test_quarter_1": 140, "busi_test_eighth_1": 70}
    for method in ("unet", "mt"):
        for split, labeled in counts.items():
            images = [image(each["key"], labeled / 1000) for each in test]
            inputs = {split: sha256_of(locate_split(split))}
            make(tmp_path / f"{method}_{labeled}", method, split, images, labeled=labeled, inputs=inputs)
    make(tmp_path / "other", "mgcc", "busi_test_1", test)
    make(tmp_path / "fold", "unet", "busi_fold_1", [image("another", 0.5)], labeled=300)
    section = label_fractions.section(rows_of(tmp_path))
    view = section.tables[0]
    assert view.column_groups == [("labeled images", ["1/8 (70)", "1/4 (140)", "1/2 (281)"])]
    assert sorted(label for label, _ in view.rows) == ["mean_teacher (unet)", "supervised (unet)"]
    assert texts(view, "supervised (unet)") == ["7.0", "14.0", "28.1"]
    assert view.runs["mean_teacher (unet)"] == "mt_70, mt_140, mt_281"
    assert "supervised (unet): IoU from 7.0 to 28.1 %" in section.pictures[0].alt


def test_curves_without_a_common_number_of_labels_have_names_of_their_own(tmp_path):
    test = [image("t", 0.5)]
    points = {1: ("busi_half", 40, "symmetries"), 2: ("busi_quarter", 20, "symmetries")}
    points |= {3: ("busi_eighth", 10, "released"), 4: ("busi_sixteenth", 5, "released")}
    for number, (split, labeled, augment) in points.items():
        make(tmp_path / f"{number}", "mt", split, test, labeled=labeled, data={"augment": augment})
    found = label_fractions.curves(rows_of(tmp_path))
    assert {curve.label: list(curve.rows) for curve in found} == {
        "mean_teacher (unet)": [20, 40],
        "mean_teacher (unet), 3": [5, 10],
    }


def test_synthetic_images_are_matched_to_runs_by_what_was_asked_for(tmp_path):
    request = {"checkpoint": "abc", "seed": 0, "count": 8}
    interval = {"value": 0.25, "low": 0.2, "high": 0.3}
    metrics = dict.fromkeys(synthetic.METRICS[:-1], interval)  # of a version without the spectral distance
    quality = {
        "request": {"samples": request},
        "features": {"kind": "MGCC"},
        "images": {"half": 4},
        "synthetic_halves": metrics,
        "real_halves": metrics | {"fid": interval | {"value": 0.125}},
    }
    audit = {
        "request": {"samples": request},
        "threshold": 0.5,
        "near_copies": ["s-3"],
        "synthetic": {"images": 8, "median": 0.3, "highest": 0.6},
    }
    classes = {"benign": {"pairs": 5, "dropped": 2}, "normal": {"pairs": 3, "dropped": 1}}
    dropped = {"request": {"samples": request}, "pairs": 8, "dropped": 3, "classes": classes}
    for kind, content in (("quality", quality), ("audit", audit), ("filter", dropped)):
        (tmp_path / "ldm" / kind).mkdir(parents=True)
        (tmp_path / "ldm" / kind / f"{kind}.json").write_text(json.dumps(content))
    for name, asked in (("ours", request | {"count": 4}), ("other", request | {"seed": 1})):
        make(tmp_path / name, "mgcc", "busi_test_1", [image("a", 0.5)], synthetic={"request": asked})
    make(tmp_path / "pairs", "mgcc", "busi_test_1", [image("a", 0.5)], synthetic_labeled={"request": request})
    section = synthetic.section(find_runs([tmp_path / name for name in ("ours", "other", "pairs")]), [tmp_path])
    missing, filtered = section.notes
    assert missing == "No quality.json or audit.json was found for the synthetic images of other."
    assert filtered.endswith("mask of 3 of 8 pairs, which were dropped (benign 2 of 5, normal 1 of 3).")
    measured, audited = section.tables
    ((name, _),) = measured.column_groups
    by_metric = dict(measured.rows)
    assert [(cell.text, cell.note) for cell in by_metric["FID ↓"]] == [("0.25", "0.2 to 0.3"), ("0.125", "0.2 to 0.3")]
    assert [cell.text for cell in by_metric["spectral distance (dB) ↓"]] == [NO_VALUE, NO_VALUE]
    assert [by_metric[row][0].text for row in ("images", "features", "runs")] == ["4", "MGCC", "ours, pairs"]
    assert audited.runs == {name: "ours, pairs"}
    ((_, cells),) = audited.rows
    assert [cell.text for cell in cells] == ["8", "1", "0.50", "0.30", "0.60", "–"]  # noqa: RUF001
    assert cells[1].note == "12.5 %"


def test_keys_that_differ_are_tabulated_with_the_names_of_runs(tmp_path):
    make(tmp_path / "a", "mt", "busi_test_1", [image("a", 0.5)])
    make(tmp_path / "b", "mt", "busi_test_1", [image("a", 0.6)], data={"augment": "released"})
    (view,) = differences.section(rows_of(tmp_path)).tables
    labels = ["mean_teacher (unet)", "mean_teacher (unet), data.augment released"]
    assert view.column_groups == [("data", ["augment"])]
    assert [(label, [cell.text for cell in cells]) for label, cells in view.rows] == [
        (labels[0], ["symmetries"]),
        (labels[1], ["released"]),
    ]
    assert view.runs == dict(zip(labels, "ab", strict=True))


def test_runs_of_a_row_that_were_not_selected_leave_it_its_name(tmp_path):
    chosen = make(tmp_path / "seed_1", "mt", "busi_grouped_1", [image("a", 0.5)])
    make(tmp_path / "seed_2", "mt", "busi_grouped_2", [image("b", 0.5)], seed=2)
    (row,) = name_groups(group_runs(find_runs([tmp_path]).segmentation), {chosen: "MT"})
    assert row.label == "MT"
    assert len(row.group.runs) == 2


def test_a_report_of_folds_as_page_and_tables(tmp_path, capsys):
    make_folds(tmp_path / "runs", {"unet": 0.5, "mt": 0.6, "mgcc": 0.7})
    outs = [tmp_path / f"report{suffix}" for suffix in (".html", ".md", ".tex")]
    report([str(tmp_path / "runs"), *(word for out in outs for word in ("--out", str(out)))])
    page, markdown, latex = (out.read_text() for out in outs)
    for title in ("By split, and pooled", "Mean ranks and critical difference", "What differs between the rows"):
        assert f"<h2>{title}</h2>" in page
        assert f"## {title}" in markdown
    assert "folds" not in markdown.split("## By split")[0]
    assert r"| mgcc\_1, mgcc\_2, mgcc\_3, mgcc\_4, mgcc\_5 |" in markdown
    assert r"mgcc: mgcc\_1, mgcc\_2" in latex
    with pytest.raises(UserError, match=r"report\.csv: \.csv holds only sweep tables"):
        report([str(tmp_path / "runs"), "--out", str(tmp_path / "report.csv")])
