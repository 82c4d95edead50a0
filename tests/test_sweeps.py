"""Sweep files: expansion to runs that `segment` accepts, and errors for invalid files."""

import shlex
from itertools import product
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS, as_plain, flatten
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.sweep_file import read_sweep, slug
from mgcc_dist.methods.registry import METHODS, build
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.sweeps import main

SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
SEMI = ["MT", "UA-MT", "DCT", "CPS", "CTBCT", "CCT", "MGCC"]
SMALL = {
    "title": "a title",
    "out": "out/x",
    "preset": "mgcc_busi",
    "seeds": [1, 2, 3],
    "datasets": {"BUSI": {"data": {"split": "busi_random_{split}"}}},
    "rows": {"U-Net": {"network": {"name": "unet"}}, "MGCC": {}},
}


def parsed(run):
    """Parse a run's command as `segment` does."""
    module, program, *arguments = run.command()
    assert (module, program) == ("-m", "mgcc_dist.segment")
    return parse(SegmentConfig, arguments, CONFIGS / "segment", "mgcc_demo")


def written(tmp_path, **changes):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_segment_accepts_every_run_of_a_shipped_sweep(path):
    sweep = read_sweep(path)
    folders = [run.folder for run in sweep.runs]
    assert len(set(folders)) == len(folders)
    for run in sweep.runs:
        config = as_plain(parsed(run))
        assert config["out"] == str(run.folder)
        assert {key: flatten(config)[key] for key in flatten(run.config)} == flatten(run.config)
        assert config["loop"]["seed"] == run.seed
        assert f"_{run.split}" in config["data"]["split"]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_table_has_the_paper_s_rows_and_settings(number):
    sweep = read_sweep(CONFIGS / "sweeps" / f"table_{number}.yaml")
    rows = [*(["U-Net", "CMU-Net"] if number in (1, 4) else []), *SEMI]
    assert list(sweep.rows) == rows
    assert sweep.columns == {"BUSI": "BUSI", "TN3K": "TUS"}
    assert [(r.seed, r.dataset, r.row) for r in sweep.runs] == list(product((1, 2, 3), ("BUSI", "TN3K"), rows))
    for run in sweep.runs:
        config = parsed(run)
        supervised = config.method.name == "supervised"
        assert supervised == (run.row in ("U-Net", "CMU-Net"))
        assert (config.data.batch_labeled, config.data.batch_unlabeled) == ((8, 0) if supervised else (4, 4))
        assert config.data.labels == ("all" if supervised or number == 4 else "half")
        assert bool(config.data.similar) == (number == 2)
        assert bool(config.data.synthetic) == (number in (3, 4) and not supervised)
        assert (config.loop.epochs, config.loop.learning_rate, config.data.image_size) == (300, 0.01, 256)


def test_the_tables_cover_every_method_except_the_one_that_is_not_in_the_paper():
    methods = {parsed(run).method.name for path in SWEEPS for run in read_sweep(path).runs}
    assert methods == METHODS.keys() - {"cutmix_teacher"}


def test_the_small_table_has_the_paper_s_rows_with_smaller_networks():
    sweep = read_sweep(CONFIGS / "sweeps" / "table_1_small.yaml")
    assert list(sweep.rows) == ["U-Net", "CMU-Net", *SEMI]
    for run in sweep.runs[: len(sweep.rows)]:
        config = parsed(run)
        parameters = sum(p.numel() for p in build(config.method, config.network).predictor().parameters())
        assert 1e6 < parameters < 4e6  # a quarter of the width


def test_row_keys_override_data_set_keys_which_override_defaults(tmp_path):
    sizes = [{"data": {"image_size": size, "workers": size}} for size in (1, 2, 3)]
    del sizes[1]["data"]["workers"], sizes[2]["data"]["workers"]
    path = written(tmp_path, defaults=sizes[0], datasets={"BUSI": sizes[1]}, rows={"a": sizes[2], "b": {}})
    configs = [run.config["data"] for run in read_sweep(path).runs[:2]]
    assert configs == [{"image_size": 3, "workers": 1}, {"image_size": 2, "workers": 1}]


def test_seeds_can_share_a_split(tmp_path):
    runs = read_sweep(written(tmp_path, splits=[1, 1, 1])).runs
    assert [(run.split, run.seed) for run in runs[::2]] == [(1, 1), (1, 2), (1, 3)]
    assert {run.config["data"]["split"] for run in runs} == {"busi_random_1"}


def test_commands_of_the_selected_runs_are_printed_and_quoted_for_a_shell(tmp_path, capsys):
    path = written(tmp_path)
    main([str(path), "--rows", "U-Net", "--seeds", "2", "3"])
    lines = capsys.readouterr().out.splitlines()
    expected = [run for run in read_sweep(path).runs if run.row == "U-Net" and run.seed > 1]
    assert [shlex.split(line)[1:] for line in lines] == [run.command() for run in expected]
    with pytest.raises(UserError, match=r"--rows: 'UNet' is not in .*\. Did you mean U-Net\?"):
        main([str(path), "--rows", "UNet"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "seed 1 appears more than once"),
        ({"seeds": "123"}, "seeds must be a list of integers"),
        ({"splits": [1]}, "got 1 splits for 3 seeds"),
        ({"rows": {"a b": {}, "a-b": {}}}, "rows 'a b' and 'a-b' would use the folder name 'a-b'"),
        ({"rows": []}, "rows must be a mapping"),
        ({"datasets": {}}, "datasets must be a mapping"),
        ({"reference": "CPS"}, "reference 'CPS' is not a row. Choose one of: U-Net, MGCC"),
        ({"row": {}}, "unknown key 'row'"),
        ({"title": None}, "key 'title' is missing"),
        ({"defaults": [1]}, "defaults must hold keys of `segment`"),
        ({"rows": {"a": {"nets": {}}}}, r"rows\.a\.nets is not one of the sections"),
        ({"rows": {"a": {"data": {"split": "{k}"}}}}, r"placeholder in '\{k\}' .* Available: \{split\} and \{seed\}"),
    ],
)
def test_an_invalid_sweep_is_rejected_with_file_and_key(tmp_path, changes, message):
    path = written(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        read_sweep(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["- 1\n", "a: [\n", ""])
def test_a_file_that_is_not_a_sweep_is_named_in_the_error(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"x\.yaml"):
        read_sweep(path)
    with pytest.raises(UserError, match=r"nowhere\.yaml: file not found\. Shipped .* configs/sweeps/table_1\.yaml"):
        read_sweep(Path("nowhere.yaml"))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(min_size=1, max_size=12))
def test_folder_names_hold_only_letters_digits_and_hyphens(name):
    assert set(slug(name)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
