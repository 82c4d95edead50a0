"""A sweep's table: matching of runs, the paper's values, missing runs, and paired tests."""

import pytest
import yaml
from sweep_runs import begin, finish, finish_all, make_sweep, scores

from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.report import main as report
from mgcc_dist.reporting.paper import PAPER_TABLES, load_paper_table
from mgcc_dist.reporting.runs import RunCollection, find_runs
from mgcc_dist.reporting.tables import build_table
from mgcc_dist.reporting.views import sweep_section
from mgcc_dist.sweep.expansion import read_sweep

LEVELS = {"U-Net": 0.5, "CPS": 0.6, "MGCC": 0.6}
SWEEPS = sorted(path for path in (CONFIGS / "sweeps").glob("table_*.yaml") if not path.stem.endswith("_demo"))


def table_of(path, *folders):
    sweep = read_sweep(path)
    folders = folders or (sweep.out,)
    return build_table(sweep, find_runs(folders), folders)


def score(table, row, protocol="paper", metric="iou"):
    return table.results["BUSI"][row].scores[protocol, metric]


def texts(view, row):
    return [cell.text for cell in dict(view.rows)[row]]


def test_a_score_is_the_mean_over_runs_next_to_the_paper_s(tmp_path):
    path = make_sweep(tmp_path)
    for run, level in zip((run for run in read_sweep(path).runs if run.row == "MGCC"), (0.6, 0.7), strict=True):
        finish(run, [scores("a", level), scores("b", level + 0.1)])
    mgcc = score(table_of(path), "MGCC")
    assert mgcc.values == pytest.approx((65, 75))
    assert mgcc.mean == pytest.approx(70)
    assert mgcc.std == pytest.approx(50**0.5)
    assert mgcc.paper == (68.06, 2.45)
    assert mgcc.difference == pytest.approx(70 - 68.06)
    assert score(table_of(path), "MGCC", "corrected").paper is None  # the paper does not report it
    view = sweep_section(table_of(path)).tables[0]
    assert texts(view, "MGCC")[:4] == ["2 of 2", "70.00 ± 7.07", "68.06 ± 2.45", "+1.94"]


def test_runs_with_identical_scores_are_named_and_give_no_deviation(tmp_path):
    path = make_sweep(tmp_path)
    for run in read_sweep(path).runs:
        if run.row == "MGCC":
            finish(run, [scores("a", 0.6), scores("b", 0.7)])
    table = table_of(path)
    assert score(table, "MGCC").values == pytest.approx((65,))
    section = sweep_section(table)
    assert texts(section.tables[0], "MGCC")[:2] == ["2 of 2", "65.00"]
    (note,) = [note for note in section.notes if "identical" in note]
    first, second = (run.name for run in table.results["BUSI"]["MGCC"].finished.values())
    assert note == f"MGCC on BUSI: {second} (identical to {first}), so it is not counted in mean and deviation."


def test_missing_and_unfinished_runs_are_shown_and_no_row_is_dropped(tmp_path):
    path = make_sweep(tmp_path)
    for run in read_sweep(path).runs:
        if (run.row, run.seed) == ("CPS", 1):
            finish(run, [scores("a", 0.5)])
        elif (run.row, run.seed) in (("CPS", 2), ("MGCC", 2)):
            begin(run)
    table = table_of(path)
    results = table.results["BUSI"]
    assert [(row, result.missing) for row, result in results.items()] == [("U-Net", 2), ("CPS", 1), ("MGCC", 2)]
    with_paper, others = sweep_section(table).tables
    assert texts(with_paper, "U-Net")[:4] == ["0 of 2", "–", "69.69 ± 0.95", "–"]  # noqa: RUF001
    assert texts(with_paper, "CPS")[:2] == ["1 of 2, 1 unfinished", "50.00"]
    assert texts(with_paper, "MGCC")[0] == "0 of 2, 1 unfinished"
    assert texts(others, "U-Net") == ["–"] * 8  # noqa: RUF001


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loop__optimizer__momentum": 0.5}, r"loop\.optimizer\.momentum is 0\.5, but small sets 0\.9\. "),
        ({"data__split": "busi_random_3"}, r"data\.split is busi_random_3, but small sets busi_random_1\. "),
        ({"loop__seed": 9, "data__image_size": 64}, r"data\.image_size is 64, .* 256 \(and 1 more key\)"),
        ({"loop__later_key": 1}, r"config\.yaml: loop\.later_key: unknown key"),
    ],
)
def test_a_run_with_another_config_is_an_error_that_names_the_key(tmp_path, changed, message):
    path = make_sweep(tmp_path)
    finish(read_sweep(path).runs[0], [scores("a", 0.5)], **changed)
    with pytest.raises(UserError, match=message) as caught:
        table_of(path)
    assert str(read_sweep(path).runs[0].folder) in str(caught.value)


def test_keys_that_do_not_affect_the_result_may_differ(tmp_path):
    path = make_sweep(tmp_path)
    finish(read_sweep(path).runs[0], [scores("a", 0.5)], data__workers=7, loop__log_every=1, loop__checkpoint_every=3)
    assert score(table_of(path), "U-Net").values == (50,)


def test_a_run_that_another_version_named_is_matched_by_its_identity(tmp_path):
    path = make_sweep(tmp_path)
    run = read_sweep(path).runs[0]
    finish(run, [scores("a", 0.5)], run.folder.with_name("seed_1-0123abcd"))
    finish(run, [scores("a", 0.9)], run.folder.with_name("seed_1-89abcdef"), loop__learning_rate=0.5)
    assert score(table_of(path), "U-Net").values == (50,)


def test_a_table_of_selected_rows_and_seeds(tmp_path, capsys):
    path = make_sweep(tmp_path)
    finish_all(path, LEVELS)
    report(["--sweep", str(path), "--rows", "MGCC", "--seeds", "2", "--out", str(tmp_path / "table.md")])
    assert "small: 1 of 1 runs are finished" in capsys.readouterr().out
    assert "U-Net" not in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match="--rows: selects runs of a sweep"):
        report([str(tmp_path), "--rows", "MGCC"])


@pytest.mark.parametrize("inside", ["", "out"])
def test_moved_runs_are_matched_by_their_relative_path(tmp_path, inside):
    path = make_sweep(tmp_path)
    sweep = read_sweep(path)
    run = sweep.runs[0]
    finish(run, [scores("a", 0.5)], tmp_path / "moved" / inside / run.folder.relative_to(sweep.out))
    assert score(table_of(path, tmp_path / "moved"), "U-Net").values == (50,)


def test_runs_in_other_folders_are_not_matched(tmp_path):
    path = make_sweep(tmp_path)
    finish(read_sweep(path).runs[0], [scores("a", 0.5)], tmp_path / "moved" / "by_hand")
    assert score(table_of(path, tmp_path / "moved"), "U-Net").values == ()


def test_two_folders_for_the_same_run_are_an_error(tmp_path):
    path = make_sweep(tmp_path)
    sweep = read_sweep(path)
    run = sweep.runs[0]
    finish(run, [scores("a", 0.5)])
    finish(run, [scores("a", 0.9)], tmp_path / "copy" / run.folder.relative_to(sweep.out))
    assert score(table_of(path, sweep.out, sweep.out), "U-Net").values == (50,)  # the same folder passed twice
    with pytest.raises(UserError, match=r"U-Net on BUSI, seed 1, is in both .*seed_1-\w+ and .*seed_1-\w+\. "):
        table_of(path, sweep.out, tmp_path / "copy")


def test_only_a_truly_different_row_is_significant(tmp_path):
    path = make_sweep(tmp_path)
    finish_all(path, LEVELS)
    table = table_of(path)
    different, similar, reference = (score(table, row) for row in LEVELS)
    assert reference.test is None
    assert different.p_holm < 0.001 < 0.05 < similar.p_holm
    assert different.test.low < 10 < different.test.high  # MGCC's 60 minus 50
    assert (different.test.images, different.test.pairs) == (60, 80)
    assert different.p_holm == pytest.approx(2 * different.test.p)  # Holm over two rows
    assert score(table, "U-Net", "lesion").test.pairs == 60
    view = sweep_section(table).tables[0]
    assert [cells[1].significant for _, cells in view.rows] == [True, False, False]


def test_tests_do_not_depend_on_the_order_of_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [make_sweep(tmp_path / name) for name in "ab"]
    finish_all(paths[0], LEVELS)
    finish_all(paths[1], LEVELS, shuffle=True)
    first, second = (score(table_of(path), "U-Net", "lesion") for path in paths)
    assert first.test == second.test


def test_only_splits_that_both_rows_have_are_tested(tmp_path):
    path = make_sweep(tmp_path)
    finish_all(path, LEVELS, skip=[("MGCC", 2), ("CPS", 1)])
    table = table_of(path)
    assert score(table, "U-Net").test.pairs == 40
    assert score(table, "CPS").test is None


def test_runs_scored_on_different_images_cannot_be_compared(tmp_path):
    path = make_sweep(tmp_path)
    for run in read_sweep(path).runs[:3]:
        finish(run, [scores("a", 0.5), scores("b" if run.row == "MGCC" else "c", 0.5)])
    with pytest.raises(
        UserError, match=r"mgcc/seed_1-\w+ and .*u-net/seed_1-\w+ cannot be compared: 'b' was scored in only one"
    ):
        table_of(path)


def test_bold_marks_the_best_among_the_rows_with_the_most_runs(tmp_path):
    path = make_sweep(tmp_path)
    finish_all(path, {"U-Net": 0.5, "CPS": 0.7, "MGCC": 0.6}, spread=0, skip=[("CPS", 2)])
    rows = sweep_section(table_of(path)).tables[0].rows
    assert [cells[1].bold for _, cells in rows] == [False, False, True]
    assert [cells[2].bold for _, cells in rows] == [True, False, False]  # the paper's U-Net


def test_a_sweep_without_paper_or_reference_shows_neither(tmp_path):
    path = make_sweep(tmp_path, paper=None, reference=None)
    finish_all(path, LEVELS)
    section = sweep_section(table_of(path))
    assert [names for _, names in section.tables[0].column_groups] == [["runs"], ["ours"], ["ours"], ["ours"], ["ours"]]
    assert not section.details
    assert not any("†" in line or "paper" in line for line in section.legend)


def test_a_data_set_that_replaces_the_paper_s_is_noted(tmp_path):
    path = make_sweep(tmp_path, datasets={"TN3K": {"paper": "TUS", "data": {"split": "s_{split}"}}})
    table = build_table(read_sweep(path), RunCollection(), [])
    assert any("TN3K replaces the paper's TUS" in note for note in sweep_section(table).notes)
    assert table.results["TN3K"]["U-Net"].scores["paper", "iou"].paper == (82.63, 0.23)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_have_all_rows_and_columns_of_their_paper_table(path):
    sweep = read_sweep(path)
    assert sweep.paper
    rows = load_paper_table(sweep.paper).rows
    assert list(sweep.rows)[: len(rows)] == list(rows)
    assert set(sweep.columns.values()) <= {column for row in rows.values() for column in row}


def test_the_paper_s_tables_match_the_transcription(data_root):
    original = data_root.parent / "paper" / "tables.yaml"
    if not original.is_file():
        pytest.skip(f"needs the transcription {original}")
    theirs, ours = (yaml.safe_load(file.read_text()) for file in (original, PAPER_TABLES))
    assert ours.keys() == theirs.keys()
    for key, table in theirs.items():
        assert ours[key]["setting"] == table["setting"]
        rows = ours[key]["rows"]
        if isinstance(table["rows"], list):  # V and VI, whose rows are unnamed
            plain = [{name: row[name] for name in ("iou", "f1")} for row in table["rows"]]
            assert [row["BUSI"] for row in rows.values()] == plain
        else:
            assert rows == table["rows"]


def test_gates_and_taps_of_tables_v_and_vi_match_the_paper_s(data_root):
    original = data_root.parent / "paper" / "tables.yaml"
    if not original.is_file():
        pytest.skip(f"needs the transcription {original}")
    theirs = yaml.safe_load(original.read_text())
    by_number = {number: read_sweep(CONFIGS / "sweeps" / f"table_{number}.yaml") for number in (5, 6)}
    gates = [[row[name] for name in ("aux1", "aux2", "aux3", "main")] for row in theirs["table_V"]["rows"]]
    assert [row["network"]["gates"] for row in by_number[5].rows.values()] == gates
    taps = [row["lengths"] for row in theirs["table_VI"]["rows"]]
    assert [row["network"].get("taps") for row in by_number[6].rows.values()][: len(taps)] == taps


def test_unknown_paper_table_and_empty_sweep_are_rejected(tmp_path):
    with pytest.raises(UserError, match=r"'table_IX' is not one of the paper's tables\. .*table_I, table_II"):
        build_table(read_sweep(make_sweep(tmp_path, paper="table_IX")), RunCollection(), [])
    with pytest.raises(UserError, match=r"small: the sweep has no runs\. .*--efficiency"):
        build_table(read_sweep(make_sweep(tmp_path, seeds=[])), RunCollection(), [])
