"""Sweep files: expansion to runs that `segment` accepts, and errors for invalid files."""

import shlex
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.cli import PROGRAMS
from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS, save
from mgcc_dist.common.errors import UserError
from mgcc_dist.methods.config import METHODS
from mgcc_dist.methods.method import build
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.sweep.expansion import read_sweep, select
from mgcc_dist.sweep.schema import slug
from mgcc_dist.sweeps import main

SWEEPS = sorted(path.stem for path in (CONFIGS / "sweeps").glob("*.yaml"))
SEMI = ["MT", "UA-MT", "DCT", "CPS", "CTBCT", "CCT", "MGCC"]
SMALL = {
    "title": "a title",
    "out": "out/x",
    "preset": "mgcc_busi",
    "seeds": [1, 2, 3],
    "datasets": {"BUSI": {"data": {"split": "busi_random_{split}"}}},
    "rows": {"U-Net": {"method": {"name": "supervised"}, "network": {"name": "unet"}}, "MGCC": {}},
}


def parsed(run):
    """Parse a run's command as `segment` does."""
    module, program, *arguments = run.command()
    assert (module, program) == ("-m", "mgcc_dist.segment")
    return parse(SegmentConfig, arguments, CONFIGS / "segment", "mgcc_demo")


def prepared(**step):
    return {"datasets": {"BUSI": {"prepare": {"a": step}}}}


def written(tmp_path, **changes):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


@pytest.mark.parametrize("name", SWEEPS)
def test_the_command_of_every_run_of_a_shipped_sweep_gives_its_config(name):
    sweep = read_sweep(name)
    folders = [run.folder for run in sweep.runs]
    assert len(set(folders)) == len(folders)
    for run in sweep.runs:
        assert parsed(run) == run.config
        assert run.config.out == str(run.folder)
        assert run.config.loop.seed == run.seed
        assert f"_{run.split}" in run.config.data.split


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_table_has_the_paper_s_rows_and_settings(number):
    sweep = read_sweep(f"table_{number}")
    rows = [*(["U-Net", "CMU-Net"] if number in (1, 4) else []), *SEMI]
    assert list(sweep.rows) == rows
    assert sweep.columns == {"BUSI": "BUSI", "TN3K": "TUS"}
    assert [(r.seed, r.dataset, r.row) for r in sweep.runs] == list(product((1, 2, 3), ("BUSI", "TN3K"), rows))
    for run in sweep.runs:
        config = run.config
        supervised = config.method.name == "supervised"
        assert supervised == (run.row in ("U-Net", "CMU-Net"))
        assert (config.data.batch_labeled, config.data.batch_unlabeled) == ((8, 0) if supervised else (4, 4))
        assert config.data.labels == ("all" if supervised or number == 4 else "half")
        assert bool(config.data.similar) == (number == 2)
        assert bool(config.data.synthetic) == (number in (3, 4) and not supervised)
        assert (config.loop.epochs, config.loop.learning_rate, config.data.image_size) == (300, 0.01, 256)


def test_the_tables_cover_every_method_except_those_that_are_not_in_the_paper():
    methods = {run.config.method.name for name in SWEEPS for run in read_sweep(name).runs}
    assert methods == set(METHODS.names()) - {"cutmix_teacher", "fixmatch", "unimatch", "bcp"}


def test_the_small_table_has_the_paper_s_rows_and_more_with_smaller_networks():
    sweep = read_sweep("table_1_small")
    half = "U-Net, half of the labels"
    assert list(sweep.rows) == ["U-Net", "CMU-Net", *SEMI, half, f"{half}, 4 per step"]
    for run in sweep.runs[: len(sweep.rows)]:
        config = run.config
        parameters = sum(p.numel() for p in build(config.method, config.network).predictor().parameters())
        assert 1e6 < parameters < 4e6  # a quarter of the width


def test_row_keys_override_data_set_keys_which_override_defaults(tmp_path):
    sizes = [{"data": {"image_size": size, "workers": size}} for size in (16, 32, 48)]
    del sizes[1]["data"]["workers"], sizes[2]["data"]["workers"]
    path = written(tmp_path, defaults=sizes[0], datasets={"BUSI": sizes[1]}, rows={"a": sizes[2], "b": {}})
    configs = [run.config.data for run in read_sweep(path).runs[:2]]
    assert [(data.image_size, data.workers) for data in configs] == [(48, 16), (32, 16)]


def test_placeholders_are_filled_in_for_every_seed(tmp_path):
    datasets = {
        "BUSI": {"data": {"split": "s_{split}", "similar": ["a_{seed}", "b"]}, "loop": {"warmup_steps": "{seed}"}}
    }
    path = written(
        tmp_path, seeds=[7, 8], splits=[1, 2], datasets=datasets, rows={"a": {}, "b": {"loop": {"warmup_steps": 5}}}
    )
    configs = [run.config for run in read_sweep(path).runs]
    assert [config.data.similar for config in configs] == [("a_7", "b")] * 2 + [("a_8", "b")] * 2
    assert [config.data.split for config in configs] == ["s_1", "s_1", "s_2", "s_2"]
    assert [config.loop.warmup_steps for config in configs] == [7, 5, 8, 5]


def test_seeds_can_share_a_split(tmp_path):
    runs = read_sweep(written(tmp_path, splits=[1, 1, 1])).runs
    assert [(run.split, run.seed) for run in runs[::2]] == [(1, 1), (1, 2), (1, 3)]
    assert {run.config.data.split for run in runs} == {"busi_random_1"}


def test_commands_of_the_selected_runs_are_printed_and_quoted_for_a_shell(tmp_path, capsys):
    path = written(tmp_path)
    main([str(path), "--rows", "U-Net", "--seeds", "2", "3"])
    lines = capsys.readouterr().out.splitlines()
    expected = [run for run in read_sweep(path).runs if run.row == "U-Net" and run.seed > 1]
    assert [shlex.split(line)[1:] for line in lines] == [run.command() for run in expected]
    with pytest.raises(UserError, match=r"--rows: 'UNet' is not in .*\. Did you mean U-Net\?"):
        main([str(path), "--rows", "UNet"])


@pytest.mark.parametrize(
    ("selected", "steps", "runs"),
    [
        ({}, 29, 42),
        ({"datasets": ["BUSI"], "seeds": [1]}, 5, 7),
        ({"datasets": ["TN3K"], "seeds": [1, 2], "rows": ["MGCC"]}, 11, 2),
    ],
)
def test_only_steps_that_the_selected_runs_need_are_kept(selected, steps, runs):
    sweep = select(read_sweep("table_3"), **selected)
    assert (len(sweep.steps), len(sweep.runs)) == (steps, runs)
    names = {step.name for step in sweep.steps}
    assert all(set(step.needs) <= names for step in sweep.steps)


PREPARE = {
    "shards": {"run": "shards phantom --out s", "makes": "s/index.json"},
    "split": {"run": "shards split --root s --out s_{split}.json", "makes": "s_{split}.json"},
    "model": {
        "run": "ldm --out m_{split} --until {stage}",
        "makes": {"denoiser": "m_{split}/d", "samples": "m_{split}/s"},
    },
}


def needs_of(tmp_path, rows, dataset=(), **changes):
    """Names of the steps that each step, and each row's run with seed 2, needs."""
    prepare = {name: PREPARE[name] | changes.get(name, {}) for name in PREPARE}
    datasets = {"BUSI": {"prepare": prepare, **dict(dataset)}}
    sweep = read_sweep(written(tmp_path, seeds=[1, 2], datasets=datasets, rows=rows))
    named = {step.name: step.needs for step in sweep.steps} | {
        run.row: run.needs for run in sweep.runs if run.seed == 2
    }
    return {name: [each.removeprefix("busi/") for each in needs] for name, needs in named.items()}


def test_steps_and_runs_wait_for_the_entries_that_they_need(tmp_path):
    rows = {"a": {}, "b": {"needs": ["split"]}, "c": {"needs": []}}
    after_shards = {name: {"needs": ["shards"]} for name in ("split", "model")}
    needs = needs_of(tmp_path, rows, {"needs": ["split", "model"]}, **after_shards)
    assert needs["busi/split-split_2"] == ["shards"]
    assert needs["busi/model-denoiser-split_2"] == ["shards"]
    assert needs["busi/model-samples-split_1"] == ["shards", "model-denoiser-split_1"]
    assert needs["a"] == ["shards", "split-split_2", "model-denoiser-split_2", "model-samples-split_2"]
    assert needs["b"] == ["shards", "split-split_2"]
    assert needs["c"] == []


def test_the_order_of_entries_does_not_matter_if_they_say_what_they_need(tmp_path):
    explicit = {"split": {"needs": ["shards"]}, "model": {"needs": ["split"]}}
    before = needs_of(tmp_path, {"a": {}}, **explicit)
    prepare = {name: PREPARE[name] | explicit.get(name, {}) for name in reversed(PREPARE)}
    assert needs_of(tmp_path, {"a": {}}, {"prepare": prepare}) == before


def test_without_needs_an_entry_waits_for_the_one_before_and_runs_for_all(tmp_path):
    needs = needs_of(tmp_path, {"a": {}})
    chain = ["shards", "split-split_2", "model-denoiser-split_2", "model-samples-split_2"]
    assert [needs[f"busi/{name}"] for name in chain] == [chain[:index] for index in range(4)]
    assert needs["a"] == chain


def test_a_sweep_takes_what_its_base_says(tmp_path):
    (tmp_path / "derived").mkdir()
    written(tmp_path, datasets={"BUSI": SMALL["datasets"]["BUSI"], "TN3K": {"data": {"split": "t_{split}"}}})
    path = tmp_path / "derived" / "mine.yaml"
    rows = {
        "U-Net": None,
        "MGCC": {"network": {"kernel_size": 5}},
        "CCT": {"method": {"name": "cct"}, "network": {"name": "cct"}},
    }
    changes = {"base": "../sweep.yaml", "seeds": [7], "rows": rows, "datasets": {"TN3K": None}}
    path.write_text(yaml.safe_dump(changes))
    sweep = read_sweep(path)
    assert (sweep.name, sweep.title, list(sweep.rows), list(sweep.columns)) == (
        "mine",
        "a title",
        ["MGCC", "CCT"],
        ["BUSI"],
    )
    assert [(run.config.loop.seed, run.config.data.split) for run in sweep.runs] == [(7, "busi_random_7")] * 2
    assert sweep.runs[0].config.network.kernel_size == 5
    path.write_text(yaml.safe_dump({"base": "table_6", "seeds": [5]}))
    assert len(read_sweep(path).runs) == 8


def test_a_preset_of_ones_own_may_have_a_shipped_one_as_base(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"base": "mgcc_busi_small", "loop": {"epochs": 3}}))
    run = read_sweep(written(tmp_path, preset=str(tmp_path / "mine.yaml"))).runs[1]
    assert (run.config.loop.epochs, run.config.network.widths) == (3, (8, 16, 32, 64, 128))
    assert parsed(run) == run.config


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("tabel_1", r"sweep\.yaml: base: tabel_1: file not found.*Did you mean table_1\?"),
        ("sweep.yaml", "as its own base"),
    ],
)
def test_a_base_that_cannot_be_read_is_named(tmp_path, base, message):
    with pytest.raises(UserError, match=message):
        read_sweep(written(tmp_path, base=base))


# --- identity


def folders_of(tmp_path, **changes):
    return [run.folder.name for run in read_sweep(written(tmp_path, **changes)).runs]


def test_keys_that_do_not_affect_the_result_keep_the_folder(tmp_path):
    before = folders_of(tmp_path, out=str(tmp_path))
    neutral = {"loop": {"log_every": 1, "checkpoint_every": 7, "keep_checkpoints": 9}, "data": {"workers": 9}}
    assert folders_of(tmp_path, out=str(tmp_path / "elsewhere"), defaults=neutral) == before
    assert (
        folders_of(tmp_path, defaults={"loop": {"optimizer": {"momentum": 0.9}}}) == before
    )  # the default, written out
    others = folders_of(tmp_path, defaults={"loop": {"optimizer": {"momentum": 0.5}}})
    assert not set(others) & set(before)


def test_an_existing_run_of_the_same_identity_keeps_its_folder(tmp_path):
    """Another version may have computed another hash for it."""
    changes = {"out": str(tmp_path / "out"), "seeds": [1, 2]}
    first, *_ = read_sweep(written(tmp_path, **changes)).runs
    older = first.folder.with_name("seed_1-0123abcd")
    save(first.config, older / "config.yaml")
    assert read_sweep(written(tmp_path, **changes)).runs[0].folder == first.folder  # it has not started
    (older / "result.json").write_text("{}")
    runs = read_sweep(written(tmp_path, **changes)).runs
    assert [run.folder == older for run in runs] == [True, False, False, False]
    assert runs[0].config.out == str(older)
    other = read_sweep(written(tmp_path, defaults={"loop": {"optimizer": {"momentum": 0.5}}}, **changes)).runs[0]
    assert other.folder.name not in (older.name, first.folder.name)


# --- errors


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
        (
            {"rows": {"a": {"network": {"tapz": [1]}}}},
            r"rows\.a: network\.tapz: unknown key\. Did you mean network\.taps\?",
        ),
        (
            {"rows": {"a": {"loop": {"epochs": "many"}}}},
            r"rows\.a: loop\.epochs: expected a positive number or none, got",
        ),
        (
            {"rows": {"a": {"loop": {"steps": 5, "epochs": 5}}}},
            r"a on BUSI: loop\.epochs and loop\.steps: expected a value",
        ),
        ({"rows": {"a": {"loop": {"seed": 5}}}}, r"rows\.a: loop\.seed: is set by `seeds`"),
        (
            {"defaults": {"data": {"wrokers": 1}}},
            r"defaults: data\.wrokers: unknown key\. Did you mean data\.workers\?",
        ),
        (
            {"datasets": {"BUSI": {"data": {"image_size": -1}}}},
            r"datasets\.BUSI: data\.image_size: expected a positive int",
        ),
        ({"paper": "table_X"}, r"paper 'table_X' is not one of the paper's tables\. Choose one of: table_I, table_II"),
        ({"search": {"row": "a", "space": {}}}, r"search: dataset is missing"),
        ({"preset": "mgcc_bus"}, r"preset: mgcc_bus: unknown preset\. Did you mean mgcc_busi\?"),
        (
            prepared(run="ldm --sampling.cuont 5", makes="x"),
            r"prepare\.a\.run: --sampling\.cuont: unknown option\. Did you",
        ),
        (
            prepared(run="shards busi --out o --root r --size x", makes="x"),
            r"prepare\.a\.run: --size: expected an integer",
        ),
        (
            prepared(run="shards busy --root r", makes="x"),
            r"prepare\.a\.run: shards: busy: unknown command\. Did you mean bus",
        ),
        (
            prepared(run="shard busi", makes="x"),
            r"prepare\.a\.run: shard: unknown program\. A step runs one of shards, ldm",
        ),
        (prepared(run="ldm 'x", makes="x"), r"prepare\.a\.run: No closing quotation"),
        (prepared(run="ldm", makes="x", needs=["b"]), r"prepare\.a\.needs: 'b' is not an entry of `prepare`"),
        (prepared(run="ldm", makes="x", need=["b"]), r"prepare\.a: unknown key 'need'\. Known keys: run, makes, needs"),
        (
            {"datasets": {"BUSI": {"prepare": {n: {"run": "ldm", "makes": n, "needs": [m]} for n, m in ("ab", "ba")}}}},
            r"datasets\.BUSI\.prepare: (a needs b needs a|b needs a needs b)",
        ),
        ({"rows": {"a": {"needs": ["b"]}}}, r"rows\.a\.needs: 'b' is not an entry of `prepare`"),
        ({"rows": {"a": {"data": {"split": "{k}"}}}}, r"placeholder in '\{k\}' .* Available: \{split\} and \{seed\}"),
    ],
)
def test_an_invalid_sweep_is_rejected_with_file_and_key(tmp_path, changes, message):
    path = written(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        read_sweep(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["- 1\n", "a: [\n", "", "rows: {a: {}, a: {}}"])
def test_a_file_that_is_not_a_sweep_is_named_in_the_error(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"x\.yaml"):
        read_sweep(path)
    with pytest.raises(UserError, match=r"nowhere\.yaml: file not found, .*Shipped sweeps: table_1, table_1_small"):
        read_sweep(Path("nowhere.yaml"))


@pytest.mark.parametrize("seeds", [[1], []])
@pytest.mark.parametrize("command", ["sweep", "slurm submit", "slurm submit --dry-run", "slurm status", "report"])
def test_every_command_checks_the_keys_of_all_runs_first(tmp_path, command, seeds):
    """Without this, a misspelt key fails jobs hours after they were submitted."""
    rows = {"U-Net": {}, "MGCC": {"network": {"tapz": [1, 2]}}}
    path = written(tmp_path, seeds=seeds, rows=rows, out=str(tmp_path / "out"))
    program, *words = command.split()
    words[1:1] = [*(["--sweep"] if program == "report" else []), str(path)]
    with pytest.raises(UserError, match=r"sweep\.yaml: rows\.MGCC: network\.tapz: unknown key"):
        import_module(PROGRAMS[program][0]).main(words)
    assert not (tmp_path / "out").exists()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(min_size=1, max_size=12))
def test_folder_names_hold_only_letters_digits_and_hyphens(name):
    assert set(slug(name)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
