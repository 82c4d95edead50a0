"""The report program: finding and grouping runs, unfinished runs, and damaged files."""

import base64
import copy
import html
import json
import re
import subprocess
import sys

import pytest
import yaml

from mgcc_dist.common.errors import UserError
from mgcc_dist.report import main
from mgcc_dist.reporting import page, run_configs
from mgcc_dist.train.saved_run import read_config

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
OPTIONAL = ("dataset", "images", "parameters", "steps", "seconds", "versions", "commit", "world_size", "precision")
CONFIG = {
    "data": {"shards": "busi", "split": "busi_random_1", "synthetic": None},
    "loop": {"epochs": 2.0, "seed": 1, "learning_rate": 0.1},
    "network": {"name": "mgcc", "widths": [8, 16]},
    "out": "o",
}
ROWS = [
    {"step": 5, "epoch": 1.0, "split": "train", "loss": 0.5},
    {"step": 5, "epoch": 1.0, "split": "validation", "iou": 0.5},
]


def make_run(folder, rows=ROWS, finished=True, config=CONFIG, **changes):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "result.json").write_text(json.dumps(RESULT | changes))


def with_iou(iou):
    best = copy.deepcopy(RESULT["best"])
    best["summary"]["corrected"]["iou"] = iou
    return best


def with_setting(path, value):
    config = copy.deepcopy(CONFIG)
    section, _, key = path.rpartition(".")
    (config[section] if section else config)[key] = value
    return config


def report(*folders, out):
    main([*map(str, folders), "--out", str(out)])
    return out.read_text()


def rows_of(method, printed):
    return [line for line in printed.splitlines() if line.startswith(method)]


def test_runs_that_differ_only_in_split_and_seed_share_a_row_with_mean_and_std(tmp_path, capsys):
    for k, iou in enumerate((0.60, 0.64, 0.68), start=1):
        config = with_setting("loop.seed", k) | {"out": f"m{k}"}
        make_run(tmp_path / "runs" / f"m{k}", config=config, split=f"busi_random_{k}", seed=k, best=with_iou(iou))
    make_run(tmp_path / "runs" / "grouped", split="busi_grouped_1")
    make_run(tmp_path / "runs" / "unet", config=CONFIG | {"method": {"name": "supervised"}}, method="supervised")
    page = report(tmp_path / "runs", out=tmp_path / "report.html")
    printed = capsys.readouterr().out
    assert "64.00 ± 4.00" in printed
    assert '64.00<br><span class="soft">± 4.00' in page
    assert len(rows_of("mgcc", printed)) == 2
    assert len(rows_of("supervised", printed)) == 1
    assert "m1, m2, m3" in printed
    assert printed.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"


def test_of_many_runs_the_first_have_cards_and_the_configs_of_a_group_are_checked_once(tmp_path, monkeypatch):
    for seed in (1, 2, 3):
        config = with_setting("loop.seed", seed) | {"out": f"m{seed}"}
        make_run(tmp_path / "runs" / f"m{seed}", config=config, seed=seed, best=with_iou(0.1 * seed))
    checked = []
    monkeypatch.setattr(run_configs, "read_config", lambda *words: checked.append(words) or read_config(*words))
    monkeypatch.setattr(page, "MOST_CARDS", 2)
    text = report(tmp_path / "runs", out=tmp_path / "report.html")
    assert len(checked) == 1
    assert "Segmentation runs: 3." in text
    assert "m1, m2, m3" in text
    assert text.count("<summary>Settings</summary>") == 2
    assert "The first 2 of 3." in text


@pytest.mark.parametrize(
    ("other", "rows"),
    [
        ({"config": with_setting("loop.learning_rate", 0.2)}, 2),
        ({"images": {"labeled": 20, "unlabeled": 10}}, 2),
        ({"config": with_setting("network.widths", [8, 32])}, 2),
        ({"config": with_setting("data.shards", "elsewhere")}, 1),
        ({"config": with_setting("loop.log_every", 3)}, 1),
        ({"config": with_setting("method", {"name": "mgcc", "ramp": "released"})}, 1),  # the default
        ({"config": CONFIG | {"unknown": 1}}, 2),  # a key of another version
        ({"world_size": 2}, 2),
        ({"dataset_sha256": "b" * 64}, 2),
        ({"dataset_sha256": "a" * 64}, 1),
        ({"config": with_setting("data.synthetic", "elsewhere")}, 1),
        ({"config": with_setting("data.workers", 7)}, 1),
        ({"config": with_setting("out", "elsewhere")}, 1),
    ],
)
def test_runs_with_different_settings_are_not_averaged(tmp_path, capsys, other, rows):
    make_run(tmp_path / "runs" / "a", dataset_sha256="a" * 64)
    make_run(tmp_path / "runs" / "b", **{"dataset_sha256": "a" * 64, **other})
    report(tmp_path / "runs", out=tmp_path / "report.html")
    assert len(rows_of("mgcc", capsys.readouterr().out)) == rows


def test_folds_of_slightly_different_sizes_share_a_row(tmp_path, capsys):
    images = {"labeled": 10, "unlabeled": 20, "validation": 4, "test": 9}
    for fold in (1, 2):
        config = with_setting("data.split", f"busi_fold_{fold}")
        counts = {**images, "test": 8 + fold}
        make_run(tmp_path / "runs" / f"{fold}", split=f"busi_fold_{fold}", images=counts, config=config)
    report(tmp_path / "runs", out=tmp_path / "report.html")
    assert len(rows_of("mgcc", capsys.readouterr().out)) == 1


def test_scores_of_a_split_with_a_test_part_are_those_of_the_test_part(tmp_path, capsys):
    best = {**with_iou(0.9), "test": {"summary": with_iou(0.321)["summary"], "images": []}}
    make_run(tmp_path / "runs" / "a", best=best, images={"labeled": 10, "validation": 4, "test": 9})
    page = report(tmp_path / "runs", out=tmp_path / "report.html")
    (row,) = rows_of("mgcc", capsys.readouterr().out)
    assert "32.10" in row
    assert "90.00" not in page
    assert "busi_random_1 (test part) seed 1" in page


def test_data_sets_of_one_name_are_told_apart_by_their_content(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a", dataset="mine", dataset_sha256="a" * 64)
    make_run(tmp_path / "runs" / "early", dataset="mine", split="busi_random_2")  # as written by version 0.1
    page = report(tmp_path / "runs", out=tmp_path / "one.html")
    assert len(rows_of("mgcc", capsys.readouterr().out)) == 1
    assert "mine (" not in page
    make_run(tmp_path / "runs" / "b", dataset="mine", dataset_sha256="b" * 64)
    page = report(tmp_path / "runs", out=tmp_path / "report.html")
    assert len(rows_of("mgcc", capsys.readouterr().out)) == 3
    assert "mine (aaaaaaaa)" in page
    assert "mine (bbbbbbbb)" in page
    assert "mine (unknown)" in page


def test_surface_distances_state_how_many_lesions_they_cover(tmp_path, capsys):
    best = copy.deepcopy(RESULT["best"])
    best["summary"] |= {"hd95": 0.0, "surfaces": 1, "lesions": 10, "hd95_penalized": 9.25, "asd_penalized": 8.125}
    make_run(tmp_path / "runs" / "a", best=best)
    page = report(tmp_path / "runs", out=tmp_path / "report.html")
    printed = capsys.readouterr().out
    assert re.search(r"0\.00 \(1 of 10\) +9\.25 ", rows_of("mgcc", printed)[0])
    assert '0.00<br><span class="soft">1 of 10</span>' in page
    assert "9.25" in page
    assert "8.12" in page


@pytest.mark.parametrize(
    ("second", "remark"),
    [
        ({}, "identical to a"),
        ({"seed": 2, "config": with_setting("loop.seed", 2)}, "identical to a"),
        ({"best": with_iou(0.7)}, "same settings and seed as a"),
    ],
)
def test_repeated_runs_are_named_and_count_once(tmp_path, capsys, second, remark):
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b", **second)
    page = report(tmp_path / "runs", out=tmp_path / "report.html")
    printed = capsys.readouterr().out
    (row,) = rows_of("mgcc", printed)
    assert row.endswith(f"a, b ({remark})")
    assert f"b ({remark})" in page
    assert "61.00" in row
    assert "±" not in row


def test_repeated_runs_do_not_shrink_the_deviation_of_others(tmp_path, capsys):
    for name, seed, iou in (("a", 1, 0.60), ("b", 1, 0.60), ("c", 2, 0.64)):
        config = with_setting("loop.seed", seed)
        make_run(tmp_path / "runs" / name, config=config, seed=seed, best=with_iou(iou))
    report(tmp_path / "runs", out=tmp_path / "report.html")
    (row,) = rows_of("mgcc", capsys.readouterr().out)
    assert "62.00 ± 2.83" in row
    assert row.endswith("a, b (identical to a), c")


def test_a_run_passed_twice_counts_once(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a")
    report(tmp_path / "runs", tmp_path / "runs" / "a", tmp_path / "runs" / ".." / "runs", out=tmp_path / "report.html")
    printed = capsys.readouterr().out
    assert "61.00" in printed
    assert "±" not in printed


def test_all_protocols_are_shown_for_the_best_and_the_last_step(tmp_path):
    last = copy.deepcopy(RESULT["last"])
    last["summary"]["lesion"]["f1"] = 0.7654
    make_run(tmp_path / "run", last=last)
    page = re.sub(r"\s+", " ", report(tmp_path / "run", out=tmp_path / "report.html"))
    table = page.split("All three protocols")[1]
    best, last = table.split('rowspan="3">best<')[1].split('rowspan="3">last<')
    places = [best.index(text) for text in (">corrected<", ">61.00<", ">lesion<", ">62.00<", ">paper<", ">60.00<")]
    assert places == sorted(places)
    assert "76.54" in last
    assert "76.54" not in best


def test_page_needs_no_other_file_and_escapes_text(tmp_path):
    make_run(tmp_path / "<script>run", config=CONFIG | {"note": "<script>"}, split='"><script>', commit="<script>")
    (tmp_path / "<script>run" / "best").mkdir()
    (tmp_path / "<script>run" / "best" / "gallery.png").write_bytes(b"\x89PNG")
    page = report(tmp_path, out=tmp_path / "report.html")
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|<link", page)
    assert "<script" not in page
    assert "phantom &lt;b&gt;" in page
    assert "12.50" in page
    assert page.count("data:image/svg+xml;base64,") == 2  # overview, this run
    assert page.count("data:image/png;base64,") == 1
    assert len(re.findall("<img ", page)) == len(re.findall(r'<img class="\w+" alt="[^"]{20,}"', page)) == 3


def test_a_result_without_optional_keys_is_shown(tmp_path, capsys):
    make_run(tmp_path / "old")
    result = {key: value for key, value in RESULT.items() if key not in OPTIONAL} | {"best": {"summary": {}}}
    (tmp_path / "old" / "result.json").write_text(json.dumps(result))
    (tmp_path / "old" / "metrics.jsonl").unlink()
    (tmp_path / "old" / "config.yaml").unlink()
    report(tmp_path, out=tmp_path / "report.html")
    assert len(rows_of("mgcc", capsys.readouterr().out)) == 1


def test_provenance_is_shown_for_current_and_early_result_files(tmp_path):
    make_run(tmp_path / "older")
    environment = {"commit": "def456", "device": "gpu x", "versions": {"torch": "3"}, "node": "n1"}
    make_run(tmp_path / "newer", environment=environment, commit=None, device=None, versions={})
    page = report(tmp_path, out=tmp_path / "report.html")
    assert "<code>abc</code>" in page
    assert "<code>def456</code>" in page
    assert "gpu x" in page
    assert "torch 3" in page


def test_unfinished_runs_are_listed_with_their_progress(tmp_path, capsys):
    make_run(tmp_path / "runs" / "done")
    make_run(tmp_path / "runs" / "killed", finished=False, rows=[*ROWS, {"step": 4321, "epoch": 7.0, "split": "train"}])
    make_run(tmp_path / "runs" / "new", finished=False, rows=[])
    page = report(tmp_path / "runs", out=tmp_path / "report.html")
    unfinished = page.split("<h2>Unfinished runs</h2>")[1].split("<h2>")[0]
    assert "At step 4,321" in unfinished
    assert unfinished.count("data:image/svg+xml") == 1
    printed = capsys.readouterr().out
    assert "unfinished: killed" in printed
    assert "unfinished: new" in printed
    assert "done" in rows_of("mgcc", printed)[0]


def test_a_report_of_only_unfinished_runs_is_written(tmp_path, capsys):
    make_run(tmp_path / "killed", finished=False)
    report(tmp_path, out=tmp_path / "report.html")
    assert capsys.readouterr().out.splitlines() == ["unfinished: killed", f"report: {tmp_path / 'report.html'}"]


def make_ldm(folder):
    for stage in ("autoencoder", "denoiser"):
        rows = [{"step": 1, "split": "train", "loss": 1.0}, {"step": 1, "split": "validation", "loss": 1.0, "mse": 1.0}]
        facts = {"program": "ldm", "stage": stage, "parameters": 5, "best": {}, "last": {}}
        make_run(folder / stage, rows=rows, config={"data": {}, stage: {}}, **facts)
    (folder / "config.yaml").write_text("autoencoder: {}\ndenoiser: {}\n")


def test_both_generative_stages_and_their_gallery_are_shown(tmp_path, capsys):
    make_ldm(tmp_path / "ldm")
    (tmp_path / "ldm" / "gallery.png").write_bytes(b"\x89PNG")
    page = report(tmp_path / "ldm", out=tmp_path / "report.html")
    assert page.count("data:image/svg+xml;base64,") == 2
    assert base64.b64encode(b"\x89PNG").decode() in page
    assert "Unfinished runs</h2>" not in page
    assert capsys.readouterr().out.startswith("no segmentation runs found\n")


def test_a_generative_run_without_gallery_is_unfinished(tmp_path, capsys):
    make_ldm(tmp_path / "ldm")
    report(tmp_path, out=tmp_path / "report.html")
    assert "unfinished: ldm\n" in capsys.readouterr().out


WITHOUT_KEYS = copy.deepcopy(RESULT) | {"best": {"summary": SUMMARY, "images": [{"key": "a"}]}}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("result.json", "{", r"result\.json: is damaged"),
        ("result.json", "[]", r"result\.json: is damaged \(no result in it\)"),
        ("result.json", '{"program": "segment"}', r"result\.json: not the result of a run\. Move it elsewhere and"),
        ("result.json", '{"program": ["paint"]}', r"result\.json: not the result of a run"),
        ("result.json", json.dumps(RESULT | {"best": {}}), r"result\.json: not the result of a run"),
        ("result.json", json.dumps(RESULT | {"split": 1}), r"result\.json: not the result of a run"),
        ("result.json", json.dumps(WITHOUT_KEYS), r"result\.json: not the result of a run"),
        ("config.yaml", "a: [", r"config\.yaml: not valid YAML .*\)\. Restore it\."),
        ("config.yaml", "5", r"config\.yaml: not a run's config"),
        ("config.yaml", "data: 5", r"config\.yaml: not a run's config"),
        ("evaluate/summary.json", "{", r"evaluate/summary\.json: is not JSON .* Repeat the evaluation into another"),
        ("audit/audit.json", "{", r"audit/audit\.json: is not JSON"),
    ],
)
def test_a_damaged_folder_is_named_and_the_others_are_reported(tmp_path, capsys, file, content, message):
    make_run(tmp_path / "good")
    make_run(tmp_path / "bad", best=with_iou(0.3))
    for name in (file, *(("evaluate/evaluate.json", "evaluate/images.csv") if "/" in file else ())):
        (tmp_path / "bad" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bad" / name).write_text(content)
    page = html.unescape(report(tmp_path, out=tmp_path / "report.html"))
    printed = capsys.readouterr()
    (row,) = rows_of("mgcc", printed.out)
    assert row.endswith("  good" if "/" not in file else "  bad, good (same settings and seed as bad)")
    (warning,) = [line for line in printed.err.splitlines() if "WARNING" in line]
    assert re.search(message + r".* Left out of the report\.$", warning)
    assert re.search(message, page.split("<h2>Damaged folders</h2>")[1])
    if "/" not in file:
        with pytest.raises(UserError, match="bad: no run can be read"):
            report(tmp_path / "bad", out=tmp_path / "none.html")
        assert not (tmp_path / "none.html").exists()


def test_damaged_metrics_do_not_end_the_report(tmp_path):
    make_run(
        tmp_path / "run", rows=[*ROWS, {**ROWS[1], "iou": "x"}, {**ROWS[1], "epoch": "x"}, {**ROWS[0], "loss": []}]
    )
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff{"step"')
    assert "Damaged folders" not in report(tmp_path, out=tmp_path / "report.html")


def test_invalid_arguments_are_rejected(tmp_path):
    with pytest.raises(UserError, match="no runs found"):
        report(tmp_path, out=tmp_path / "report.html")
    with pytest.raises(UserError, match="nowhere: not a folder"):
        report(tmp_path / "nowhere", out=tmp_path / "report.html")
    with pytest.raises(UserError, match=r"nothing to report\. Pass folders of runs, --sweep FILE or --efficiency"):
        main([])
    make_run(tmp_path / "run")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="directory"):
        report(tmp_path / "run", out=tmp_path / "folder.html")
    with pytest.raises(UserError, match=r"report\.pdf: unknown format '\.pdf'\. Use one of: \.html, \.md,"):
        report(tmp_path / "run", out=tmp_path / "report.pdf")
    with pytest.raises(UserError, match=r"\.md: these runs give no table to compare\. Write \.html, or add --sweep"):
        report(tmp_path / "run", out=tmp_path / "report.md")
    with pytest.raises(UserError, match=r"none\.yaml: file not found"):
        main(["--sweep", str(tmp_path / "none.yaml")])


def test_a_report_of_finished_runs_imports_no_torch():
    code = "import sys, mgcc_dist.reporting.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
