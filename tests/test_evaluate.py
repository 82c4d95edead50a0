"""`mgcc evaluate`: what it writes, from what, and what it refuses."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from predict_runs import SIZE, bytes_in, save_run
from ranks import finish, forked
from torch import nn

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.loader import EvalLoader, Ranks
from mgcc_dist.data.records import write_index, write_shard
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.splits import Split, write_split
from mgcc_dist.evaluate import main
from mgcc_dist.evaluation.calibration import risk_coverage
from mgcc_dist.evaluation.config import EvaluateConfig
from mgcc_dist.evaluation.gallery import Case, draw_cases
from mgcc_dist.evaluation.metrics import score_image
from mgcc_dist.evaluation.scores import score_images
from mgcc_dist.evaluation.threshold import THRESHOLDS, threshold_scores
from mgcc_dist.evaluation.threshold import choose as choose_threshold
from mgcc_dist.inference import predictor
from mgcc_dist.inference.evaluation_inputs import open_inputs
from mgcc_dist.inference.loading import load_predictor
from mgcc_dist.inference.uncertainty import Members

FILES = {"evaluate.json", "images.csv", "summary.json", "page.html", "gallery.png", ".lock"}


class Dark(nn.Module):
    """Stand-in for a trained network: what is darker than a grey value is a lesion."""

    def __init__(self, limit=-0.72):
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(limit))

    def forward(self, x):
        return 20 * (self.limit - x)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "a")


@pytest.fixture
def dark(monkeypatch):
    """Replace the run's network."""
    monkeypatch.setattr(predictor, "load_network", lambda path: (Dark(), SIZE))


def evaluate(run, shards, out, *options):
    runs = map(str, run if isinstance(run, list) else [run])
    main(["--runs", *runs, "--shards", str(shards), "--out", str(out), "--workers", "0", "--batch", "5", *options])
    return json.loads((out / "summary.json").read_text())


def table(out):
    with (out / "images.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_page_csv_and_summary_say_the_same(run, phantom_shards, tmp_path, dark, capsys):
    out = tmp_path / "out"
    summary = evaluate(run, phantom_shards.folder, out, "--corruptions", "--tta", "flips")
    assert {path.name for path in out.iterdir()} == FILES
    rows = table(out)
    assert [row["key"] for row in rows] == sorted(phantom_shards.keys())
    overall = summary["overall"]
    assert (overall["images"], overall["lesions"]) == (len(rows), sum(row["lesion"] == "1" for row in rows))
    dice = np.mean([float(row["dice"]) for row in rows])
    assert overall["corrected"]["dice"]["mean"] == pytest.approx(dice)
    assert len(summary["corruptions"]) == 30
    assert 0 <= summary["risk_coverage"]["aurc_best"] <= summary["risk_coverage"]["aurc"]
    page = (out / "page.html").read_text()
    assert f"{100 * dice:.1f}" in page
    assert f"{100 * dice:.1f}" in capsys.readouterr().out
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert summary["runs"][0]["weights_sha256"][:12] in page


def test_scores_at_the_training_size_equal_those_of_a_training_run(run, phantom_shards, tmp_path, no_pictures):
    """By `score_images`, which wrote a run's result.json."""
    evaluate(run, phantom_shards.folder, tmp_path / "out", "--size", str(SIZE))
    network, _ = load_predictor(run)
    loader = EvalLoader(phantom_shards, 5, SIZE, Ranks())
    expected = score_images(network, loader.batches(), Accelerator(cpu=True), surface=True)
    for row, score in zip(table(tmp_path / "out"), expected, strict=True):
        assert row["key"] == score["key"]
        assert float(row["iou"]) == score["corrected"]["iou"]
        assert float(row["paper_dice"]) == score["paper"]["f1"]
        assert row["hd95"] == ("" if score["hd95"] is None else str(score["hd95"]))


def test_size_is_refused_for_a_run_that_did_not_stretch_images(phantom_shards, tmp_path):
    cropped = save_run(tmp_path / "cropped", fit="crop")
    with pytest.raises(UserError, match=r"--size: stretches images, and .*cropped was trained with data\.fit crop"):
        evaluate(cropped, phantom_shards.folder, tmp_path / "out", "--size", str(SIZE))


def test_the_same_command_has_nothing_to_do_and_another_is_refused(run, phantom_shards, tmp_path, dark, no_pictures):
    out = tmp_path / "out"
    evaluate(run, phantom_shards.folder, out)
    before = bytes_in(out)
    evaluate(run, phantom_shards.folder, out, "--batch", "3")
    assert bytes_in(out) == before
    with pytest.raises(UserError, match=r"out: holds an evaluation with other tta .*Choose another --out"):
        evaluate(run, phantom_shards.folder, out, "--tta", "flips")
    with pytest.raises(UserError, match=r"other weights and"):
        evaluate(save_run(tmp_path / "b", 1), phantom_shards.folder, out, "--size", "16")
    assert bytes_in(out) == before


def test_an_interrupted_evaluation_is_completed(run, phantom_shards, tmp_path, dark, no_pictures):
    out = tmp_path / "out"
    evaluate(run, phantom_shards.folder, out)
    before = (out / "images.csv").read_bytes()
    (out / "summary.json").unlink()
    (out / "images.csv").write_text("cut")
    evaluate(run, phantom_shards.folder, out)
    assert (out / "images.csv").read_bytes() == before


def test_a_folder_with_other_files_is_refused(run, phantom_shards, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds 'notes\.txt' and is not the folder of an evaluation"):
        evaluate(run, phantom_shards.folder, tmp_path)
    with pytest.raises(UserError, match=r"is not the folder of an evaluation"):
        evaluate(run, phantom_shards.folder, run)


@pytest.mark.parametrize("name", ["images.csv", "page.html", "summary.json"])
def test_files_that_no_evaluation_wrote_are_kept(run, phantom_shards, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"holds '{name}' and is not the folder of an evaluation"):
        evaluate(run, phantom_shards.folder, tmp_path)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_request_is_one_line(run, phantom_shards, tmp_path, content):
    (tmp_path / "evaluate.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluate\.json: is not .*\. Choose another --out\.$"):
        evaluate(run, phantom_shards.folder, tmp_path)


def test_a_subset_needs_a_split_that_has_it_and_a_run_counts_once(run, phantom_shards, tmp_path):
    keys = phantom_shards.keys()
    write_split(tmp_path / "split.json", Split("no test part", tuple(keys[:2]), tuple(keys[2:12]), tuple(keys[12:])))
    split = ["--split", str(tmp_path / "split.json")]
    for options, message in (
        (["--subset", "test"], r"--subset test: is a part of a split\. Pass --split, too\."),
        ([*split, "--subset", "test"], r"--split .*split\.json: has no test images\. Choose another --subset\."),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(run, phantom_shards.folder, tmp_path / "out", *options)
    with pytest.raises(UserError, match=r"--runs: .* have the same weights\. Name each run once\."):
        evaluate([run, run], phantom_shards.folder, tmp_path / "out")


def test_images_of_one_pixel_are_drawn_without_contours(tmp_path):
    line, pixel = np.ones((1, 9)), np.ones((1, 1))
    draw_cases([Case("line", line, line, line), Case("pixel", pixel, pixel, pixel)], "", tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size > 1000


def test_contours_surround_ground_truth_in_green_and_prediction_in_red(tmp_path):
    image = np.full((40, 20), 128)
    left, right = np.zeros((2, 40, 20))
    left[10:30, 2:8] = right[10:30, 12:18] = 1
    draw_cases([Case("case", image, left, right), Case("empty", image, 0 * left, 0 * left)], "", tmp_path / "two.png")
    red, green, _ = np.asarray(Image.open(tmp_path / "two.png")).astype(int).transpose(2, 0, 1)
    middle = red.shape[1] // 4
    for contour, columns in ((green - red > 80, slice(0, middle)), (red - green > 80, slice(middle, 2 * middle))):
        assert contour[:, columns].sum() == contour.sum() > 100


def test_post_processing_is_chosen_on_val_and_applied_to_other_images(run, phantom_shards, tmp_path, dark, no_pictures):
    keys = phantom_shards.keys()
    write_split(tmp_path / "split.json", Split("halves", tuple(keys[:2]), tuple(keys[2:12]), tuple(keys[12:])))
    val = ["--split", str(tmp_path / "split.json")]
    plain = evaluate(run, phantom_shards.folder, tmp_path / "plain", *val)
    chosen = evaluate(run, phantom_shards.folder, tmp_path / "val", *val, "--postprocess", "choose")
    setting = chosen["postprocess"]["setting"]
    assert chosen["postprocess"] == {"setting": setting, "chosen": True}
    assert setting != "none"
    assert chosen["overall"]["corrected"]["iou"]["mean"] > plain["overall"]["corrected"]["iou"]["mean"]
    assert any("chosen on the evaluated images" in note for note in chosen["notes"])
    rest = [*val, "--subset", "unlabeled"]
    by_folder = evaluate(run, phantom_shards.folder, tmp_path / "test", *rest, "--postprocess", str(tmp_path / "val"))
    by_words = evaluate(run, phantom_shards.folder, tmp_path / "words", *rest, "--postprocess", setting)
    assert by_folder["postprocess"] == by_words["postprocess"] == {"setting": setting, "chosen": False}
    assert [row["key"] for row in table(tmp_path / "test")] == sorted(keys[2:12])
    assert table(tmp_path / "test") == table(tmp_path / "words")


def test_a_threshold_is_chosen_on_val_and_applied_to_other_images(
    run, phantom_shards, tmp_path, monkeypatch, no_pictures
):
    monkeypatch.setattr(predictor, "load_network", lambda path: (Dark(-0.6), SIZE))
    keys = phantom_shards.keys()
    write_split(tmp_path / "split.json", Split("halves", tuple(keys[:2]), tuple(keys[2:12]), tuple(keys[12:])))
    val = ["--split", str(tmp_path / "split.json")]
    plain = evaluate(run, phantom_shards.folder, tmp_path / "plain", *val)
    assert plain["threshold"] == {"value": 0.5, "chosen": False}
    chosen = evaluate(run, phantom_shards.folder, tmp_path / "val", *val, "--threshold", "choose")
    value = chosen["threshold"]["value"]
    assert value != 0.5
    assert chosen["overall"]["corrected"]["iou"]["mean"] > plain["overall"]["corrected"]["iou"]["mean"]
    assert any(f"--threshold {tmp_path / 'val'}" in note for note in chosen["notes"])
    rest = [*val, "--subset", "unlabeled"]
    by_folder = evaluate(run, phantom_shards.folder, tmp_path / "test", *rest, "--threshold", str(tmp_path / "val"))
    assert by_folder["threshold"] == {"value": value, "chosen": False}
    by_number = evaluate(run, phantom_shards.folder, tmp_path / "number", *rest, "--threshold", str(value))
    assert by_number["overall"] == by_folder["overall"]
    with pytest.raises(UserError, match=r"--threshold 1: is not a number between 0 and 1, choose, or the folder of"):
        evaluate(run, phantom_shards.folder, tmp_path / "wrong", "--threshold", "1")
    with pytest.raises(UserError, match=r"--threshold .*: holds no finished evaluation\. Run it with --thr"):
        evaluate(run, phantom_shards.folder, tmp_path / "wrong", "--threshold", str(tmp_path))


def test_scores_at_thresholds_are_those_of_the_masks():
    probability, truth = np.random.default_rng(0).random((9, 7), np.float32), np.eye(9, 7, dtype=bool)
    probability[0, :3] = 0.25, 0.5, 0.75
    expected = [score_image(probability > limit, truth, False)["corrected"]["iou"] for limit in THRESHOLDS]
    assert threshold_scores(probability, truth) == expected
    scores = np.zeros((2, len(THRESHOLDS)))
    assert choose_threshold(scores) == 0.5
    scores[1, 3] = 0.1
    assert choose_threshold(scores) == THRESHOLDS[3] == 0.2


def test_a_temperature_is_fitted_on_val_and_moves_no_mask(phantom_shards, tmp_path, dark, no_pictures):
    run = save_run(tmp_path / "run")
    keys = phantom_shards.keys()
    write_split(tmp_path / "split.json", Split("halves", tuple(keys[:2]), (), tuple(keys[2:])))
    val = ["--split", str(tmp_path / "split.json")]
    with pytest.raises(UserError, match=r"--fit-temperature: needs the validation images"):
        evaluate(run, phantom_shards.folder, tmp_path / "refused", "--fit-temperature")
    fitted = evaluate(run, phantom_shards.folder, tmp_path / "fit", *val, "--fit-temperature")
    stored = json.loads((run / "best" / "calibration.json").read_text())
    assert stored["weights_sha256"] == fitted["runs"][0]["weights_sha256"]
    assert {key: stored[key] for key in fitted["temperature"]} == fitted["temperature"]
    after = evaluate(run, phantom_shards.folder, tmp_path / "after", *val, "--calibrated")
    for summary, which in ((fitted, "before"), (after, "after")):
        assert summary["reliability"]["ece"] == pytest.approx(stored["ece"][which], abs=0.01)
    assert stored["nll"]["after"] < stored["nll"]["before"]
    for first, second in zip(table(tmp_path / "fit"), table(tmp_path / "after"), strict=True):
        assert (first["iou"], first["predicted_area"]) == (second["iou"], second["predicted_area"])
        assert first["brier"] != second["brier"]


def test_images_are_ranked_by_the_agreement_of_members(run, phantom_shards, tmp_path, dark):
    """On the page, too."""
    summary = evaluate(run, phantom_shards.folder, tmp_path / "out", "--uncertainty", "tta")
    rows = table(tmp_path / "out")
    scores = [float(row["score"]) for row in rows]
    members = Members([predictor.load(run, "best", "cpu", "no")], flips=True)
    np.testing.assert_allclose(scores, members.scores([phantom_shards[i].image for i in indices(phantom_shards)]))
    expected = risk_coverage(scores, [1 - float(row["dice"]) for row in rows])
    assert summary["risk_coverage_by_score"]["aurc"] == pytest.approx(expected["aurc"])
    assert "agreement of the members of <code>--uncertainty tta</code>" in (tmp_path / "out" / "page.html").read_text()


def indices(shards):
    """By key, as the rows of images.csv."""
    return sorted(range(len(shards)), key=lambda index: shards.records[index].key)


def test_notes_name_runs_whose_training_images_are_evaluated(run, phantom_shards, tmp_path, dark, monkeypatch):
    keys = phantom_shards.keys()
    write_split(tmp_path / "split.json", Split("halves", tuple(keys[:12]), (), tuple(keys[12:])))
    info = {"dataset": "phantom", "split": "halves", "seed": 1, "weights": "w", "weights_sha256": "0" * 64}
    info |= {"method": "supervised", "network": {"name": "unet"}, "image_size": SIZE, "fit": "stretch"}
    monkeypatch.setattr(predictor, "run_info", lambda path: info)

    def notes(*options):
        config = EvaluateConfig((run,), (phantom_shards.folder,), tmp_path / "out", *options)
        return " ".join(open_inputs(config, Accelerator(cpu=True)).notes)

    split = str(tmp_path / "split.json")
    assert "some of them may be evaluated here. Pass --split halves" in notes()
    assert "was chosen on the evaluated images, so its scores are optimistic" in notes(split)
    assert "was trained on the evaluated images (labeled of halves)" in notes(split, "labeled")
    assert notes(split, "validation", "last") == ""
    info["dataset"] = "another"
    assert notes(split) == ""


def test_several_shard_folders_are_told_apart_and_devices_are_subsets(run, tmp_path, dark):
    rng = np.random.default_rng(0)
    for name in ("clinic a", "clinic b"):
        samples = []
        for number in range(12):
            image, mask = rng.integers(60, 255, (20, 30), dtype=np.uint8), np.zeros((20, 30), np.uint8)
            mask[5:12, 5 + number : 15 + number] = 255
            meta = {"dataset": name, "class": "x", "original_size": [30, 20], "pixel_spacing": [0.1, 0.1]}
            meta |= {"device": f"scanner {number % 2}", "group": f"patient {number}"}
            samples.append(Sample(f"image {number}", np.where(mask, 0, image).astype(np.uint8), mask, meta))
        (tmp_path / name).mkdir()
        write_index(tmp_path / name, name, [write_shard(tmp_path / name / "0.tar", samples)])
    both = [str(tmp_path / "clinic a"), str(tmp_path / "clinic b")]
    main(["--runs", str(run), "--shards", *both, "--out", str(tmp_path / "out"), "--workers", "0"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["overall"]["groups"] == 24  # a patient of the same name is another one in the other clinic
    names = [(subset["by"], subset["name"], subset["images"]) for subset in summary["subsets"]]
    assert [each for each in names if each[0] != "lesion size"] == [
        ("data set", "clinic a", 12),
        ("data set", "clinic b", 12),
        ("device", "scanner 0", 12),
        ("device", "scanner 1", 12),
    ]
    assert summary["overall"]["assd_mm"]["mean"] == pytest.approx(summary["overall"]["assd"]["mean"] / 10)
    assert "ASSD mm" in (tmp_path / "out" / "page.html").read_text()
    with pytest.raises(UserError, match=r"^--split: belongs to one shard folder"):
        main(["--runs", str(run), "--shards", *both, "--out", str(tmp_path / "c"), "--split", "busi_grouped_1"])
    with pytest.raises(UserError, match=r"^--shards: two folders are called 'clinic a'"):
        main(["--runs", str(run), "--shards", both[0], both[0], "--out", str(tmp_path / "c")])


@pytest.mark.parametrize("lesions", [True, False])
def test_images_with_only_or_no_lesions_have_a_page(run, tmp_path, dark, lesions):
    mask = np.zeros((20, 30), np.uint8)
    mask[5:12, 5:15] = 255 * lesions
    meta = {"dataset": "toy", "class": "x", "original_size": [30, 20]}
    samples = [Sample(f"image {number}", np.full((20, 30), 20 * number, np.uint8), mask, meta) for number in range(3)]
    write_index(tmp_path, "toy", [write_shard(tmp_path / "0.tar", samples)])
    summary = evaluate(run, tmp_path, tmp_path / "out", "--corruptions", "--postprocess", "fill,largest")
    assert (summary["overall"]["lesion"]["dice"] is not None) == lesions
    assert (summary["overall"]["specificity"] is None) == lesions
    page = (tmp_path / "out" / "page.html").read_text()
    assert ("Specificity at strength" in page) != lesions


def test_images_without_mask_and_wrong_subsets_are_errors(run, tmp_path, dark, no_pictures):
    meta = {"dataset": "toy", "class": "x", "original_size": [8, 8]}
    samples = [Sample("a", np.zeros((8, 8), np.uint8), None, meta)]
    write_index(tmp_path, "toy", [write_shard(tmp_path / "0.tar", samples)])
    with pytest.raises(UserError, match=r"1 of 1 records have no mask, the first is 'a'\. Choose a --split"):
        evaluate(run, tmp_path, tmp_path / "out")
    write_split(tmp_path / "split.json", Split("s", ("a",), (), ()))
    options = ["--split", str(tmp_path / "split.json")]
    with pytest.raises(UserError, match=r"has no validation images\. Choose another --subset"):
        evaluate(run, tmp_path, tmp_path / "out", *options)
    with pytest.raises(UserError, match=r"^--subset tests: unknown subset\. Choose one of labeled, "):
        evaluate(run, tmp_path, tmp_path / "out", *options, "--subset", "tests")
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
def test_two_ranks_score_each_image_once_and_alike(run, phantom_shards, tmp_path, no_pictures):
    options = ["--batch", "1", "--postprocess", "choose"]
    one = evaluate(run, phantom_shards.folder, tmp_path / "1", *options)
    words = ["-m", "mgcc_dist.evaluate", "--runs", run, "--shards", phantom_shards.folder, "--workers", "1"]
    finish(forked(2), [*words, *options, "--out", tmp_path / "2"])
    assert table(tmp_path / "1") == table(tmp_path / "2")
    two = json.loads((tmp_path / "2" / "summary.json").read_text())
    for key in ("overall", "subsets", "reliability", "risk_coverage", "postprocess"):
        assert one[key] == two[key]
