"""Configs: what a wrong one says, what a preset gives, what is saved."""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings, strategies

from mgcc_dist import ldm, segment
from mgcc_dist.common import command_line, config
from mgcc_dist.common.config import CONFIGS, read_yaml
from mgcc_dist.common.errors import UserError, did_you_mean
from mgcc_dist.common.options import argument, flag
from mgcc_dist.common.value_types import (
    FilePath,
    Folder,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitInterval,
    describe,
)
from mgcc_dist.ldm import LdmConfig
from mgcc_dist.methods.segment_config import SegmentConfig

PROGRAMS = {"ldm": (LdmConfig, "demo"), "segment": (SegmentConfig, "mgcc_demo")}


def parse(program, *argv):
    config_class, default = PROGRAMS[program]
    return command_line.parse(config_class, argv, CONFIGS / program, default)


def test_steps_replace_the_epochs_of_an_earlier_layer_and_epochs_the_steps(tmp_path):
    loop = parse("segment", "--loop.steps", "5").loop
    assert (loop.epochs, loop.steps) == (None, 5)
    (tmp_path / "steps.yaml").write_text("loop: {steps: 7}")
    loop = parse(
        "segment", "--preset", "mgcc_demo", "--config", str(tmp_path / "steps.yaml"), "--loop.epochs", "2"
    ).loop
    assert (loop.epochs, loop.steps) == (2, None)
    stages = parse("ldm", "--autoencoder.loop.epochs", "3")
    assert (stages.autoencoder.loop.epochs, stages.autoencoder.loop.steps) == (3, None)
    assert stages.denoiser.loop.steps


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--loop.learning_rat 0.1", "loop.learning_rat"),
        ("--loop.learning_rate fast", "loop.learning_rate"),
        ("--loop.learning_rate -1", "loop.learning_rate"),
        ("--loop.ema_decay 1.5", "loop.ema_decay"),
        ("--loop.schedule linear", "loop.schedule"),
        ("--loop.steps 5 --loop.epochs 5", "loop.epochs and loop.steps"),
        ("--loop.epochs none", "loop.epochs and loop.steps"),
        ("--network.taps [6,3]", "network.taps"),
        ("--network.kernel_size 4", "network.kernel_size"),
        ("--data.image_size 0", "data.image_size"),
        ("--data.labels most", "data.labels"),
        ("--loop.seed 4294967296", "loop.seed must be below 4,294,967,296"),
        ("--out=", "--out: expected a folder, got ''"),
        ("--data.synthetic=", "data.synthetic: expected a folder or none, got ''"),
        ("--preset nonsense", "nonsense"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_its_key(words, named):
    with pytest.raises(UserError) as caught:
        parse("segment", *words.split())
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("loop: {learnin_rate: 1}", "loop.learnin_rate: unknown key. Did you mean loop.learning_rate?"),
        ("lop: {epochs: 1}", "lop: unknown key."),
        ("loop: 3", "loop: expected a mapping of keys, got 3"),
        ("loop: {epochs: abc}", "loop.epochs: expected a positive number or none, got 'abc'"),
        ("loop: {clip_norm: .inf}", "loop.clip_norm: expected a number from 0, got 'Infinity'"),
        (
            "network: {name: unett}",
            "network.name: expected one of unet, cmunet, mgcc, cct, swin_unet, got 'unett'.",
        ),
        ("- 1", "expected a mapping of keys, got [1]"),
        ("loop: {steps: 1}\nloop: {epochs: 2}", "not valid YAML (duplicate key 'loop' in"),
        ("loop: {steps: 1, steps: 2}", "not valid YAML (duplicate key 'steps' in"),
        ("loop: &loop {more: *loop}", "not valid YAML (Circular reference detected)"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        parse("segment", "--config", str(path))
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_merged_key_that_the_mapping_overrides_does_not_stand_twice():
    text = "a: &a {k: 1, l: 1}\nouter: {inner: {deep: &b {<<: *a, k: 2}}}\nc: {<<: *b, l: 3}"
    read = read_yaml(text, "text")
    assert (read["outer"]["inner"]["deep"], read["c"]) == ({"k": 2, "l": 1}, {"k": 2, "l": 3})


def test_values_that_yaml_reads_as_something_else_are_what_was_written(tmp_path):
    (tmp_path / "a.yaml").write_text("loop: {steps: 1, precision: no, compile: no}\nout: 2026-11-27")
    read = parse("segment", "--config", str(tmp_path / "a.yaml"), "--data.shards", "a", "--data.split", "b")
    assert (read.loop.precision, read.loop.compile, read.out) == ("no", "no", "2026-11-27")


def test_a_name_that_is_not_utf8_is_refused_where_it_would_be_saved(tmp_path):
    parsed = parse("segment", "--out", os.fsdecode(b"out/\xff"))
    with pytest.raises(UserError, match=r"^'out/.udcff': is not UTF-8, so it can't be saved in config\.yaml\. "):
        config.save(parsed, tmp_path / "config.yaml")


def test_a_file_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=r"^nowhere\.yaml: not found$"):
        parse("segment", "--config", "nowhere.yaml")


@pytest.mark.parametrize("flag", ["--config {}", "--config={}"])
def test_a_file_that_is_not_yaml_is_named(tmp_path, flag):
    path = tmp_path / "mine.yaml"
    path.write_text("loop: [")
    with pytest.raises(UserError, match=r"mine\.yaml: not valid YAML"):
        parse("segment", *flag.format(path).split())


def test_the_preset_is_applied_first_wherever_it_stands():
    for words in ("--preset unet_busi --loop.epochs 7", "--loop.epochs 7 --preset unet_busi"):
        assert parse("segment", *words.split()).loop.epochs == 7
    assert parse("segment").network.name == "mgcc"
    assert parse("segment", "--preset=unet_busi").network.name == "unet"


def test_files_win_over_the_preset_in_order_and_options_over_files(tmp_path):
    (tmp_path / "a.yaml").write_text("loop: {epochs: 1, seed: 1, optimizer: {momentum: 0.1}}")
    (tmp_path / "b.yaml").write_text("loop: {epochs: 2, seed: 2}")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    loop = parse("segment", "--loop.seed", "3", *files, "--preset", "unet_busi").loop
    assert (loop.epochs, loop.seed, loop.optimizer.momentum, loop.log_every) == (2, 3, 0.1, 50)
    with pytest.raises(UserError, match=r"data\.shards \(folder\), --data\.split \(file or name\): required"):
        parse("segment", *files)  # a file instead of a preset: the default preset is not read


VALUES = {
    "loop.epochs": ["1", "2.5"],
    "loop.seed": ["0", "7"],
    "loop.precision": ["none", "bf16"],
    "network.widths": ["[8, 16]", "[4, 8, 16]"],
    "data.similar": ["[a, b]", "[]"],
    "data.unlabeled": ["true", "false"],
    "out": ["x", "a b"],
}


@settings(deadline=None, max_examples=50)
@given(
    strategies.permutations(sorted(VALUES)),
    strategies.lists(strategies.integers(0, 1), min_size=len(VALUES), max_size=len(VALUES)),
    strategies.integers(0, len(VALUES)),
    strategies.sampled_from(["unet_busi", "mgcc_demo"]),
    strategies.booleans(),
)
def test_preset_and_keys_give_the_same_config_in_any_order(keys, chosen, at, preset, joined):
    value = {key: VALUES[key][which] for key, which in zip(sorted(VALUES), chosen, strict=True)}
    options = [[f"--{key}={value[key]}"] if joined else [f"--{key}", value[key]] for key in keys]
    mixed = [*options[:at], ["--preset", preset], *options[at:]]
    first = ["--preset", preset, *(f"--{key}={value[key]}" for key in sorted(VALUES))]
    assert parse("segment", *itertools.chain(*mixed)) == parse("segment", *first)


def test_a_section_is_also_read_as_one_mapping():
    loop = parse("segment", "--loop", "{epochs: 3, seed: 5}", "--loop.seed", "6").loop
    assert (loop.epochs, loop.seed) == (3, 6)


def test_none_is_read_where_a_value_may_be_left_out():
    assert parse("segment", "--data.synthetic", "none").data.synthetic is None
    assert parse("segment", "--data.synthetic", "null").data.synthetic is None
    assert parse("segment", "--out", "none").out == "none"


@dataclass(frozen=True)
class Copy:
    source: FilePath = argument(positional=True)
    """file to copy"""
    more: tuple[FilePath, ...] = argument((), positional=True, nargs="*")
    """further files"""
    names: tuple[str, ...] = argument((), nargs="+")
    """new names"""
    to: tuple[FilePath, ...] = argument((), action="append")
    """folder; repeatable"""
    size: int | None = argument(None, nargs="?", const=10)
    """at most so many bytes"""
    dry_run: bool = flag()
    """only print"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a", Copy(Path("a"))),
        ("a b c", Copy(Path("a"), (Path("b"), Path("c")))),
        ("--dry-run a --names x y", Copy(Path("a"), names=("x", "y"), dry_run=True)),
        ("--to d a --to=e --size", Copy(Path("a"), to=(Path("d"), Path("e")), size=10)),
        ("a --size 3 --dry_run", Copy(Path("a"), size=3, dry_run=True)),
        ("a --names=x b", Copy(Path("a"), (Path("b"),), names=("x",))),
    ],
)
def test_positional_and_repeated_arguments_and_flags(words, expected):
    assert command_line.parse(Copy, words.split()) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dry-run", "source (file): required"),
        ("a --size x", "--size: expected an integer or none, got 'x'"),
        ("a --to", "--to: a value is missing. Give files."),
    ],
)
def test_wrong_arguments_are_named(words, message):
    with pytest.raises(UserError) as caught:
        command_line.parse(Copy, words.split())
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (PositiveInt, "positive integer"),
        (PositiveFloat | None, "positive number or none"),
        (UnitInterval, "number from 0 to 1"),
        (tuple[NonNegativeInt, ...], "list of integers from 0"),
        (Literal["half", "all"], "one of half, all"),
        (Literal["a", "b"] | None, "one of a, b, none"),
        (Folder | None, "folder or none"),
        (bool, "true or false"),
    ],
)
def test_types_are_named_in_words(kind, name):
    assert describe(kind) == name


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("epoch", ["loop.epochs", "loop.seed"], " Did you mean loop.epochs?"),
        ("epochs", ["a.epochs", "b.epochs"], " Did you mean a.epochs or b.epochs?"),
        ("unet", ["U-Net", "MGCC"], " Did you mean U-Net?"),
        ("xyz", ["loop.epochs"], ""),
    ],
)
def test_the_nearest_name_is_suggested(word, known, expected):
    assert did_you_mean(word, known) == expected


@pytest.mark.parametrize(
    ("program", "preset"),
    [(program, path.stem) for program in PROGRAMS for path in sorted((CONFIGS / program).glob("*.yaml"))],
)
def test_every_preset_parses_and_survives_saving(tmp_path, program, preset):
    parsed = parse(program, "--preset", preset)
    config.save(parsed, tmp_path / "config.yaml")
    assert config.load(PROGRAMS[program][0], tmp_path / "config.yaml") == parsed


def test_numbers_are_plain_so_that_checkpoints_which_hold_them_load():
    words = ["--loop.optimizer.weight_decay", "0.5", "--loop.learning_rate", "0.1", "--loop.seed", "3"]
    loop = parse("segment", *words).loop
    numbers = (loop.learning_rate, loop.optimizer.weight_decay, loop.optimizer.momentum)
    assert {type(number) for number in numbers} == {float}
    assert type(loop.seed) is int
    assert {type(width) for width in parse("ldm").autoencoder.channels} == {int}


@pytest.mark.parametrize("program", [ldm, segment])
def test_print_config_is_a_config(capsys, program):
    program.main(["--print_config"])
    assert "loop" in str(yaml.safe_load(capsys.readouterr().out))


def test_a_missing_or_damaged_run_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml: not found\. Is .* a run folder"):
        config.load(SegmentConfig, tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("loop: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        config.load(SegmentConfig, tmp_path / "config.yaml")
