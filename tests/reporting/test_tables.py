"""A sweep's table: which run counts where, what stands beside it, what is missing, and which rows differ."""

import pytest
import yaml
from sweep_runs import begin, finish, finish_all, make_sweep, scores

from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.sweep_file import read_sweep
from mgcc_dist.reporting import runs
from mgcc_dist.reporting.grids import section
from mgcc_dist.reporting.paper import TABLES, paper_table
from mgcc_dist.reporting.tables import make_table

LEVELS = {"U-Net": 0.5, "CPS": 0.6, "MGCC": 0.6}
SWEEPS = sorted(path for path in (CONFIGS / "sweeps").glob("table_*.yaml") if not path.stem.endswith("_demo"))


def table_of(path, *folders):
    sweep = read_sweep(path)
    folders = folders or (sweep.out,)
    return make_table(sweep, runs.find(folders), folders)


def score(table, row, protocol="paper", metric="iou"):
    return table.cells["BUSI"][row].scores[protocol, metric]


def texts(grid, row):
    return [text.text for text in dict(grid.rows)[row]]


def test_a_cell_is_the_mean_over_the_runs_beside_the_paper_s(tmp_path):
    path = make_sweep(tmp_path)
    for run, level in zip((run for run in read_sweep(path).runs if run.row == "MGCC"), (0.6, 0.7), strict=True):
        finish(run, [scores("a", level), scores("b", level + 0.1)])
    mgcc = score(table_of(path), "MGCC")
    assert mgcc.values == pytest.approx((65, 75))
    assert mgcc.mean == pytest.approx(70)
    assert mgcc.deviation == pytest.approx(50**0.5)
    assert mgcc.paper == (68.06, 2.45)
    assert mgcc.difference == pytest.approx(70 - 68.06)
    assert score(table_of(path), "MGCC", "corrected").paper is None  # which the paper did not compute
    grid = section(table_of(path)).grids[0]
    assert texts(grid, "MGCC")[:4] == ["2 of 2", "70.00 ± 7.07", "68.06 ± 2.45", "+1.94"]


def test_missing_and_unfinished_runs_are_shown_as_such_and_no_row_is_dropped(tmp_path):
    path = make_sweep(tmp_path)
    for run in read_sweep(path).runs:
        if (run.row, run.seed) == ("CPS", 1):
            finish(run, [scores("a", 0.5)])
        elif (run.row, run.seed) in (("CPS", 2), ("MGCC", 2)):
            begin(run)
    table = table_of(path)
    cells = table.cells["BUSI"]
    assert [(row, cell.missing) for row, cell in cells.items()] == [("U-Net", 2), ("CPS", 1), ("MGCC", 2)]
    beside, others = section(table).grids
    assert texts(beside, "U-Net")[:4] == ["0 of 2", "–", "69.69 ± 0.95", "–"]  # noqa: RUF001
    assert texts(beside, "CPS")[:2] == ["1 of 2, 1 unfinished", "50.00"]
    assert texts(beside, "MGCC")[0] == "0 of 2, 1 unfinished"
    assert texts(others, "U-Net") == ["–"] * 8  # noqa: RUF001


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loop__momentum": 0.5}, r"loop\.momentum = 0\.5, but small asks for 0\.9; "),
        ({"data__split": "busi_random_3"}, r"data\.split = busi_random_3, but small asks for busi_random_1; "),
        ({"loop__seed": 9, "data__image_size": 64}, r"data\.image_size = 64, .* 256 \(and 1 more keys\)"),
        ({"loop__later_key": 1}, r"loop\.later_key = 1, but small asks for None"),
    ],
)
def test_a_run_of_another_config_is_an_error_that_names_the_key(tmp_path, changed, message):
    path = make_sweep(tmp_path)
    finish(read_sweep(path).runs[0], [scores("a", 0.5)], **changed)
    with pytest.raises(UserError, match=message) as caught:
        table_of(path)
    assert str(read_sweep(path).runs[0].folder) in str(caught.value)


def test_settings_that_change_no_result_may_differ(tmp_path):
    path = make_sweep(tmp_path)
    finish(read_sweep(path).runs[0], [scores("a", 0.5)], data__workers=7, loop__log_every=1, loop__checkpoint_every=3)
    assert score(table_of(path), "U-Net").values == (50,)


@pytest.mark.parametrize("inside", ["", "out"])
def test_runs_that_were_moved_count_where_they_are_found(tmp_path, inside):
    path = make_sweep(tmp_path)
    sweep = read_sweep(path)
    run = sweep.runs[0]
    finish(run, [scores("a", 0.5)], tmp_path / "moved" / inside / run.folder.relative_to(sweep.out))
    assert score(table_of(path, tmp_path / "moved"), "U-Net").values == (50,)


def test_runs_elsewhere_are_no_runs_of_the_sweep(tmp_path):
    path = make_sweep(tmp_path)
    finish(read_sweep(path).runs[0], [scores("a", 0.5)], tmp_path / "moved" / "by_hand")
    assert score(table_of(path, tmp_path / "moved"), "U-Net").values == ()


def test_two_folders_for_one_cell_are_an_error(tmp_path):
    path = make_sweep(tmp_path)
    sweep = read_sweep(path)
    run = sweep.runs[0]
    finish(run, [scores("a", 0.5)])
    finish(run, [scores("a", 0.9)], tmp_path / "copy" / run.folder.relative_to(sweep.out))
    assert score(table_of(path, sweep.out, sweep.out), "U-Net").values == (50,)  # the same one twice
    with pytest.raises(UserError, match=r"U-Net on BUSI, seed 1, is both in .*seed_1-\w+ and in .*seed_1-\w+; "):
        table_of(path, sweep.out, tmp_path / "copy")


def test_only_a_row_that_differs_is_found_to_differ(tmp_path):
    path = make_sweep(tmp_path)
    finish_all(path, LEVELS)
    table = table_of(path)
    other, alike, reference = (score(table, row) for row in LEVELS)
    assert reference.test is None
    assert other.p_holm < 0.001 < 0.05 < alike.p_holm
    assert other.test.low < 10 < other.test.high  # MGCC's 60 minus 50
    assert (other.test.images, other.test.pairs) == (60, 80)
    assert other.p_holm == pytest.approx(2 * other.test.p)  # of two rows
    assert score(table, "U-Net", "lesion").test.pairs == 60
    beside = section(table).grids[0]
    assert [texts_[1].mark for _, texts_ in beside.rows] == [True, False, False]


def test_the_order_of_images_does_not_matter(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [make_sweep(tmp_path / name) for name in "ab"]
    finish_all(paths[0], LEVELS)
    finish_all(paths[1], LEVELS, shuffle=True)
    one, other = (score(table_of(path), "U-Net", "lesion") for path in paths)
    assert one.test == other.test


def test_only_splits_that_both_rows_have_are_compared(tmp_path):
    path = make_sweep(tmp_path)
    finish_all(path, LEVELS, skip=[("MGCC", 2), ("CPS", 1)])
    table = table_of(path)
    assert score(table, "U-Net").test.pairs == 40
    assert score(table, "CPS").test is None


def test_runs_that_were_scored_on_other_images_are_not_compared(tmp_path):
    path = make_sweep(tmp_path)
    for run in read_sweep(path).runs[:3]:
        finish(run, [scores("a", 0.5), scores("b" if run.row == "MGCC" else "c", 0.5)])
    with pytest.raises(
        UserError, match=r"mgcc/seed_1-\w+ and .*u-net/seed_1-\w+ cannot be compared: 'b' was scored in only one"
    ):
        table_of(path)


def test_the_best_of_a_column_is_bold_among_rows_with_most_runs(tmp_path):
    path = make_sweep(tmp_path)
    finish_all(path, {"U-Net": 0.5, "CPS": 0.7, "MGCC": 0.6}, spread=0, skip=[("CPS", 2)])
    rows = section(table_of(path)).grids[0].rows
    assert [texts_[1].bold for _, texts_ in rows] == [False, False, True]
    assert [texts_[2].bold for _, texts_ in rows] == [True, False, False]  # the paper's U-Net


def test_a_sweep_without_paper_or_reference_has_neither_beside_it(tmp_path):
    path = make_sweep(tmp_path, paper=None, reference=None)
    finish_all(path, LEVELS)
    shown = section(table_of(path))
    assert [names for _, names in shown.grids[0].groups] == [["runs"], ["ours"], ["ours"], ["ours"], ["ours"]]
    assert not shown.details
    assert not any("†" in line or "paper" in line for line in shown.legend)


def test_a_data_set_that_stands_in_for_the_paper_s_is_said(tmp_path):
    path = make_sweep(tmp_path, datasets={"TN3K": {"paper": "TUS", "data": {"split": "s_{split}"}}})
    table = make_table(read_sweep(path), runs.Found(), [])
    assert any("TN3K stands in for the paper's TUS" in note for note in section(table).notes)
    assert table.cells["TN3K"]["U-Net"].scores["paper", "iou"].paper == (82.63, 0.23)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_have_all_rows_and_columns_of_their_paper_table(path):
    sweep = read_sweep(path)
    assert sweep.paper
    rows = paper_table(sweep.paper).rows
    assert list(sweep.rows)[: len(rows)] == list(rows)
    assert set(sweep.columns.values()) <= {column for row in rows.values() for column in row}


def test_the_paper_s_tables_are_those_that_were_transcribed(data_root):
    original = data_root.parent / "paper" / "tables.yaml"
    if not original.is_file():
        pytest.skip(f"needs the transcription and {original} is not there")
    theirs, ours = (yaml.safe_load(file.read_text()) for file in (original, TABLES))
    assert ours.keys() == theirs.keys()
    for key, table in theirs.items():
        assert ours[key]["setting"] == table["setting"]
        rows = ours[key]["rows"]
        if isinstance(table["rows"], list):  # V and VI, whose rows have no names
            plain = [{name: row[name] for name in ("iou", "f1")} for row in table["rows"]]
            assert [row["BUSI"] for row in rows.values()] == plain
        else:
            assert rows == table["rows"]


def test_gates_and_taps_of_tables_v_and_vi_stand_beside_the_paper_s_own(data_root):
    original = data_root.parent / "paper" / "tables.yaml"
    if not original.is_file():
        pytest.skip(f"needs the transcription and {original} is not there")
    theirs = yaml.safe_load(original.read_text())
    by_number = {number: read_sweep(CONFIGS / "sweeps" / f"table_{number}.yaml") for number in (5, 6)}
    gates = [[row[name] for name in ("aux1", "aux2", "aux3", "main")] for row in theirs["table_V"]["rows"]]
    assert [row["network"]["gates"] for row in by_number[5].rows.values()] == gates
    taps = [row["lengths"] for row in theirs["table_VI"]["rows"]]
    assert [row["network"].get("taps") for row in by_number[6].rows.values()][: len(taps)] == taps


def test_what_cannot_be_done_is_said(tmp_path):
    with pytest.raises(UserError, match=r"table_IX is not one of the paper's tables; .*table_I, table_II"):
        make_table(read_sweep(make_sweep(tmp_path, paper="table_IX")), runs.Found(), [])
    with pytest.raises(UserError, match=r"small asks for no run; .*--efficiency"):
        make_table(read_sweep(make_sweep(tmp_path, seeds=[])), runs.Found(), [])
