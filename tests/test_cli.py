"""The `mgcc` command: every program's help, errors and start-up, through real processes and in this one."""

import dataclasses
import itertools
import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module

import pytest
import yaml

import mgcc_dist
from mgcc_dist import (
    cli,
    evaluate,
    export,
    ldm,
    listing,
    predict,
    pull,
    push,
    report,
    search,
    segment,
    serve,
    shards,
    sweeps,
)
from mgcc_dist.bench import __main__ as bench
from mgcc_dist.common import components
from mgcc_dist.common.command_line import read_command_line
from mgcc_dist.common.config import CONFIGS, settings_of
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.presets import preset_names, read_preset
from mgcc_dist.slurm import __main__ as slurm

PROGRAMS = {
    each.PROGRAM.name: each.PROGRAM
    for each in (
        bench,
        evaluate,
        export,
        ldm,
        listing,
        predict,
        pull,
        push,
        report,
        search,
        segment,
        serve,
        shards,
        sweeps,
        slurm,
    )
}
# One argv for each program and subcommand.
COMMANDS = [
    [name, *words] for name, program in PROGRAMS.items() for words in ([], *([command] for command in program.commands))
]
TWO_SCREENS = 80  # lines of 100 columns
HEAVY = ("torch", "diffusers", "accelerate", "monai", "scipy", "matplotlib")
SWEEP = "configs/sweeps/table_1.yaml"


@dataclass(frozen=True)
class Nothing:
    """A config without options."""


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def help_of(capsys, *words):
    cli.main(words)
    return capsys.readouterr().out


def error_of(*words):
    with pytest.raises(UserError) as caught:
        PROGRAMS[words[0]].main(words[1:])
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_program_that_divides_no_work_is_refused_on_several_ranks(words, monkeypatch):
    """Each rank would write every file."""
    command = PROGRAMS[words[0]].commands[words[1]] if words[1:] else PROGRAMS[words[0]].default
    if command is None:
        pytest.skip("only its subcommands run")
    started = []
    command = dataclasses.replace(command, config=Nothing, run=started.append, presets=None)
    command.main("mgcc x", [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    if words in (["segment"], ["ldm"], ["evaluate"]):
        command.main("mgcc x", [])
        assert len(started) == 2
        return
    with pytest.raises(UserError, match=r"^mgcc x: works in one process, but a launcher started 2\. Start it without"):
        command.main("mgcc x", [])
    assert len(started) == 1


def test_every_program_is_a_command_with_one_line_of_help(capsys):
    assert {*PROGRAMS, "launch"} == set(cli.PROGRAMS)
    printed = help_of(capsys, "--help")
    for name, (_, summary) in cli.PROGRAMS.items():
        assert name in printed
        assert " ".join(summary.split()) in " ".join(printed.split())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_help_names_types_in_words(capsys, words, option):
    printed = help_of(capsys, *words, option)
    assert printed.startswith(f"usage: mgcc {' '.join(words)}")
    for name in ("Optional[", "Union[", "Literal[", "<class", "PositiveInt", "UnitInterval", "NoneType", "null]", "()"):
        assert name not in printed


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_fits_on_two_screens(capsys, words):
    printed = help_of(capsys, *words, "--help")
    assert len(printed.splitlines()) <= TWO_SCREENS


@pytest.mark.parametrize("program", ["ldm", "segment"])
def test_help_all_explains_every_option_that_people_set(capsys, program):
    command = PROGRAMS[program].default
    layers = read_command_line(command.config, [], command.presets, command.default_preset).layers
    options = settings_of(command.config, layers).options.values()
    for option in options:
        assert len(option.text.split()) > 1, f"{option.key} has no docstring"
    printed = set(help_of(capsys, program, "--help-all").split())
    assert {option.name for option in options} & printed == {each.name for each in options if not each.recorded}


@pytest.mark.parametrize("program", ["ldm", "segment"])
def test_help_shows_the_defaults_of_the_chosen_preset(capsys, program):
    for preset in preset_names(CONFIGS / program):
        layers = read_preset(CONFIGS / program, CONFIGS / program / f"{preset}.yaml")
        *_, size = (layer.tree["data"]["image_size"] for layer in layers if "image_size" in layer.tree.get("data", {}))
        for words in (["--preset", preset, "--help"], ["--help", "--preset", preset]):
            printed = " ".join(help_of(capsys, program, *words).split())
            assert f"[positive integer, default: {size}]" in printed.partition("--data.image_size")[2][:200]


def test_help_of_ldm_lists_its_subcommands(capsys):
    printed = help_of(capsys, "ldm", "--help")
    assert "\n  curate " in printed
    assert "\n  apply " in printed


@pytest.mark.parametrize("words", ["shards", "list", "predict", "slurm", "sweep", "ldm apply"])
def test_a_program_that_needs_options_and_gets_none_prints_its_help(capsys, words):
    assert help_of(capsys, *words.split()).startswith(f"usage: mgcc {words}")


def test_help_shows_the_keys_of_the_chosen_components(capsys):
    printed = help_of(capsys, "segment", "--method", "ctbct", "--network", "unet", "--help")
    assert "--method.swin_unet.embed_dim" in printed
    assert "--network.widths" in printed
    assert "--network.taps" not in printed
    assert "--network.taps" in help_of(capsys, "segment", "--help")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("segment --loop.epoch 3", "--loop.epoch: unknown option. Did you mean --loop.epochs?"),
        ("segment --seed 3", "--seed: unknown option. Did you mean --loop.seed?"),
        ("segment --presett unet_busi", "--presett: unknown option. Did you mean --preset?"),
        ("segment --zzz 3", "--zzz: unknown option. --help-all lists all options."),
        ("segment --preset unet_bussi", "--preset unet_bussi: unknown preset. Did you mean unet_busi?"),
        ("segment --preset unet_busi --preset mgcc_busi", "--preset: given twice (unet_busi, mgcc_busi)."),
        (
            "segment --loop.schedule cosin",
            "loop.schedule: expected one of poly, constant, cosine, got 'cosin'. Did you",
        ),
        ("segment --method.name mgc", "got 'mgc'. Did you mean mgcc?"),
        ("segment --loop.epochs abc", "loop.epochs: expected a positive number or none, got 'abc'"),
        ("segment --loop.ema_decay 1.5", "loop.ema_decay: expected a number from 0 to 1, got '1.5'"),
        ("segment --data.image_size 0", "data.image_size: expected a positive integer, got '0'"),
        ("segment --network.widths [a,2]", "network.widths: expected a list of integers, got '[a,2]'"),
        ("segment --loop.epochs", "--loop.epochs: a value is missing. Give a positive number or none."),
        ("segment --loop.epochs --out x", "--loop.epochs: a value is missing."),
        ("segment run", "run: unexpected argument. Options begin with --."),
        ("ldm --epochs 3", "Did you mean --autoencoder.loop.epochs or --denoiser.loop.epochs?"),
        ("ldm aply --out x", "aply: unknown command. Did you mean apply?"),
        ("ldm apply --out x", "--selection (file), --samples (folder): required"),
        ("shards busbar --root x", "busbar: unknown command. Did you mean busbra?"),
        ("shards zzz", "zzz: unknown command. Choose one of busi, "),
        ("shards phantom --out x --per_shardd 3", "--per_shardd: unknown option. Did you mean --per-shard?"),
        ("predict --run x --images y --out z --weights bets", "got 'bets'. Did you mean best?"),
        (f"sweep {SWEEP} --rows unet", "--rows: 'unet' is not in configs/sweeps/table_1.yaml. Did you mean U-Net?"),
        (f"sweep {SWEEP} --seeds x", "seeds: expected integers, got 'x'"),
        (f"slurm stauts {SWEEP}", "stauts: unknown command. Did you mean status?"),
        (f"slurm submit {SWEEP} --cluster locl", "cluster: expected one of slurm, local, debug, none, got 'locl'."),
    ],
)
def test_a_typo_is_answered_in_one_line(words, message):
    assert message in error_of(*words.split())


def test_an_unknown_command_of_mgcc_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(["segmnt"])
    assert exited.value.code == 2
    assert capsys.readouterr().err == "mgcc: segmnt: unknown command. Did you mean segment?\n"


def test_names_with_dashes_and_underscores_are_the_same_option(tmp_path):
    options = ["phantom", "--count", "3", "--size", "16", "--out"]
    shards.main([*options, str(tmp_path / "a"), "--per-shard", "2"])
    shards.main([*options, str(tmp_path / "b"), "--per_shard", "2"])
    assert [len(list((tmp_path / name).glob("*.tar"))) for name in "ab"] == [2, 2]


def run(*words, **keywords):
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, timeout=300, **keywords
    )


IMPORTS = f"""
import json, sys
from mgcc_dist.cli import main
answers = []
for words in json.loads(sys.argv[1]):
    before, code = {{*sys.modules}}, 0
    try:
        main(words)
    except SystemExit as exited:
        code = exited.code
    answers.append([code, [name for name in {HEAVY} if name in sys.modules and name not in before]])
print(json.dumps(answers))
"""


def imported_by(commands, cwd=None):
    """Run `mgcc WORDS` for each of `commands` in one process: its exit code, and which of HEAVY it was the first to
    import."""
    done = run("-c", IMPORTS, json.dumps(commands), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_help_errors_and_configs_import_nothing_heavy():
    expected = {
        **{" ".join(words): 0 for words in (["--help"], ["--version"], *([*words, "--help"] for words in COMMANDS))},
        **{f"{name} --otu x": 2 for name in PROGRAMS},
        **{"segment --preset mgcc_bsui": 2, "segment --loop.epochs abc": 2, "ldm --audit.x 1": 2},
        "segment --print_config": 0,
    }
    answers = imported_by([words.split() for words in expected])
    assert dict(zip(expected, answers, strict=True)) == {words: [code, []] for words, code in expected.items()}


def test_applying_a_selection_imports_nothing_heavy(tmp_path):
    shards.main(["phantom", "--count", "4", "--size", "16", "--out", str(tmp_path / "samples")])
    index = json.loads((tmp_path / "samples" / "index.json").read_text())
    index["request"] = {"checkpoint": "abc", "seed": 0}  # what `mgcc ldm` writes
    (tmp_path / "samples" / "index.json").write_text(json.dumps(index))
    keys = [record["key"] for shard in index["shards"] for record in shard["records"]]
    content = {"format": "mgcc-dist selection", "version": 1, "samples": index["request"]}
    content |= {"accepted": keys[:2], "rejected": keys[2:]}
    (tmp_path / "selection.json").write_text(json.dumps(content))
    words = ["ldm", "apply", "--selection", "selection.json", "--samples", "samples", "--out", "curated"]
    assert imported_by([words], cwd=tmp_path) == [[0, []]]
    assert json.loads((tmp_path / "curated" / "index.json").read_text())["records"] == 2


def test_version_names_package_and_torch():
    done = run("-m", "mgcc_dist", "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"mgcc-dist {mgcc_dist.__version__} (torch 2.")


def test_the_module_and_the_command_print_the_same_commands():
    printed = run("-m", "mgcc_dist", "sweep", SWEEP).stdout
    assert "mgcc_dist.segment" in printed
    assert printed == run("-m", "mgcc_dist.sweeps", SWEEP).stdout


def test_output_that_nobody_reads_ends_the_program_quietly():
    command = f"{sys.executable} -m mgcc_dist sweep {SWEEP} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_log_level_is_an_option_of_every_program(tmp_path, capsys):
    words = ["phantom", "--count", "3", "--size", "16", "--out"]
    shards.main([*words, str(tmp_path / "a"), "--log-level", "error"])
    assert "writing" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^--log-level: 'loud' is not a log level"):
        shards.main([*words, str(tmp_path / "b"), "--log-level", "loud"])


def test_every_order_of_preset_and_keys_gives_the_same_config(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("loop: {epochs: 9, seed: 4}\n")
    parts = [["--preset", "unet_busi"], ["--config", str(tmp_path / "mine.yaml")], ["--loop.seed=5"], ["--out", "x"]]
    printed = set()
    for order in itertools.permutations(parts):
        segment.main([*itertools.chain(*order), "--print_config"])
        printed.add(capsys.readouterr().out)
    (only,) = printed
    config = yaml.safe_load(only)
    assert (config["network"]["name"], config["loop"]["epochs"], config["loop"]["seed"]) == ("unet", 9, 5)


@pytest.mark.parametrize("program", sorted({*cli.PROGRAMS} - {"launch"}))  # launch passes it on
def test_every_program_imports_plugins(program, tmp_path, monkeypatch, capsys):
    (tmp_path / "plugin_of_a_test.py").write_text("loaded = True")
    monkeypatch.setattr(components, "_IMPORTED", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    with suppress(SystemExit):  # of argparse
        import_module(cli.PROGRAMS[program][0]).main(["--import", str(tmp_path / "plugin_of_a_test.py"), "--help"])
    assert sys.modules.pop("plugin_of_a_test").loaded
    assert f"usage: mgcc {program}" in capsys.readouterr().out
