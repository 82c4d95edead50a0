"""Configs: what a wrong one says, what a preset gives, what is saved."""

import pytest
import yaml

from mgcc_dist import ldm, segment
from mgcc_dist.common import config
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.ldm import LdmConfig
from mgcc_dist.methods.segment_config import SegmentConfig

PROGRAMS = {"ldm": (LdmConfig, "demo"), "segment": (SegmentConfig, "mgcc_demo")}


def parse(program, *argv):
    config_class, default = PROGRAMS[program]
    return config.parse(config_class, argv, CONFIGS / program, default)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--loop.learning_rat 0.1", "loop.learning_rat"),
        ("--loop.learning_rate fast", "loop.learning_rate"),
        ("--loop.learning_rate -1", "loop.learning_rate"),
        ("--loop.ema_decay 1.5", "loop.ema_decay"),
        ("--loop.schedule linear", "loop.schedule"),
        ("--loop.steps 5", "loop.epochs and loop.steps"),
        ("--network.taps [6,3]", "network.taps"),
        ("--network.kernel_size 4", "network.kernel_size"),
        ("--data.image_size 0", "data.image_size"),
        ("--data.labels most", "data.labels"),
        ("--preset nonsense", "nonsense"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_its_key(words, named):
    with pytest.raises(UserError) as caught:
        parse("segment", *words.split())
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_in_a_file_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("loop: {epochs: 3, learnin_rate: 1}\n")
    with pytest.raises(UserError, match="learnin_rate"):
        parse("segment", "--config", str(path))


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


@pytest.mark.parametrize(
    ("program", "preset"),
    [(program, path.stem) for program in PROGRAMS for path in sorted((CONFIGS / program).glob("*.yaml"))],
)
def test_every_preset_parses_and_survives_saving(tmp_path, program, preset):
    parsed = parse(program, "--preset", preset)
    config.save(parsed, tmp_path / "config.yaml")
    assert config.load(PROGRAMS[program][0], tmp_path / "config.yaml") == parsed


def test_numbers_are_plain_so_that_checkpoints_which_hold_them_load():
    loop = parse("segment", "--loop.weight_decay", "0.5", "--loop.learning_rate", "0.1", "--loop.seed", "3").loop
    assert {type(loop.weight_decay), type(loop.learning_rate), type(loop.momentum)} == {float}
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
