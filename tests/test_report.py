"""The report: what it finds, how it groups, what it says of holes and damage."""

import copy
import json
import re

import pytest

from mgcc_dist.errors import UserError
from mgcc_dist.report import main

SUMMARY = {
    "paper": {"iou": 0.6, "recall": 0.5, "precision": 0.4, "f1": 0.3},
    "corrected": {"iou": 0.61, "recall": 0.51, "precision": 0.41, "f1": 0.31},
    "lesion": {"iou": 0.62, "recall": 0.52, "precision": 0.42, "f1": 0.32},
    "specificity": None,
    "images": 4,
    "lesions": 4,
    "hd95": 12.5,
    "asd": 3.25,
    "surfaces": 4,
}
RESULT = {
    "program": "segment",
    "method": "mgcc",
    "network": {"name": "mgcc", "widths": [8, 16]},
    "dataset": "phantom <b>",
    "split": "busi_random_1",
    "seed": 1,
    "images": {"labeled": 10, "unlabeled": 20, "validation": 4},
    "parameters": {"inference": 1000, "training": 2000},
    "best": {"step": 5, "epoch": 1.0, "summary": SUMMARY, "images": []},
    "last": {"step": 9, "epoch": 2.0, "summary": SUMMARY, "images": []},
    "steps": 9,
    "seconds": {"training": 1.5},
    "versions": {"torch": "2"},
    "commit": "abc",
    "world_size": 1,
    "precision": "no",
    "device": "cpu",
}
ROWS = [
    {"step": 5, "epoch": 1.0, "split": "train", "loss": 0.5},
    {"step": 5, "epoch": 1.0, "split": "validation", "iou": 0.5},
]


def make_run(folder, **changes):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "result.json").write_text(json.dumps(RESULT | changes))


def with_iou(iou):
    best = copy.deepcopy(RESULT["best"])
    best["summary"]["corrected"]["iou"] = iou
    return best


def report(*folders, out):
    main([*map(str, folders), "--out", str(out)])
    return out.read_text()


def test_runs_that_differ_in_split_and_seed_share_a_row_with_mean_and_deviation(tmp_path, capsys):
    for k, iou in enumerate((0.60, 0.64, 0.68), start=1):
        make_run(tmp_path / "runs" / f"m{k}", split=f"busi_random_{k}", seed=k, best=with_iou(iou))
    make_run(tmp_path / "runs" / "grouped", split="busi_grouped_1")
    make_run(tmp_path / "runs" / "unet", method="supervised")
    page = report(tmp_path / "runs", out=tmp_path / "report.html")
    printed = capsys.readouterr().out
    assert "64.00 ± 4.00" in printed
    assert "64.00 ± 4.00" in page
    assert len([line for line in printed.splitlines() if line.startswith("mgcc")]) == 2
    assert len([line for line in printed.splitlines() if line.startswith("supervised")]) == 1
    assert printed.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"


def test_page_needs_no_other_file_and_escapes_what_it_shows(tmp_path):
    make_run(tmp_path / "run")
    page = report(tmp_path / "run", out=tmp_path / "report.html")
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "phantom &lt;b&gt;" in page
    assert "phantom <b>" not in page
    assert "12.50" in page
    assert page.count("data:image/svg+xml;base64,") == 1


def test_an_unfinished_run_is_shown_as_unfinished(tmp_path):
    make_run(tmp_path / "done")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "config.yaml").write_text("{}\n")
    page = report(tmp_path, out=tmp_path / "report.html")
    assert "Not finished" in page
    assert str(tmp_path / "killed") in page


def test_both_generative_stages_and_their_gallery_are_shown(tmp_path):
    for stage in ("autoencoder", "denoiser"):
        facts = {"program": "ldm", "stage": stage, "parameters": 5, "best": {}, "last": {}}
        make_run(tmp_path / "ldm" / stage, **facts)
        rows = [{"step": 1, "split": "train", "loss": 1.0}, {"step": 1, "split": "validation", "loss": 1.0, "mse": 1.0}]
        (tmp_path / "ldm" / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ldm" / "config.yaml").write_text("{}\n")
    (tmp_path / "ldm" / "gallery.png").write_bytes(b"\x89PNG")
    page = report(tmp_path / "ldm", out=tmp_path / "report.html")
    assert page.count("data:image/svg+xml;base64,") == 2
    assert page.count("data:image/png;base64,") == 1
    assert "Not finished" not in page


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", r"result\.json is damaged"), ('{"program": "segment"}', r"result\.json is not the result of a run")],
)
def test_a_damaged_result_is_named(tmp_path, content, message):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text(content)
    with pytest.raises(UserError, match=message):
        report(tmp_path / "run", out=tmp_path / "report.html")


def test_nothing_to_report_is_said(tmp_path):
    with pytest.raises(UserError, match="there is no run under"):
        report(tmp_path, out=tmp_path / "report.html")
    with pytest.raises(UserError, match="is not a folder"):
        report(tmp_path / "nowhere", out=tmp_path / "report.html")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "config.yaml").write_text("{}\n")
    with pytest.raises(UserError, match="is finished"):
        report(tmp_path, out=tmp_path / "report.html")
