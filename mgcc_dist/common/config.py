"""Typed dataclass configs from presets, YAML files and the command line.

`parse(SegmentConfig, words, presets=CONFIGS / "segment", default_preset="mgcc_demo")` returns an instance of the
dataclass. The preset is applied first, wherever it stands on the line; then the `--config` files, in order; then
`--section.key value`. `common/program.py` turns config dataclasses into programs. `save` writes a config into a run
folder, `load` reads it back.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from mgcc_dist.common.errors import SharedError, UserError, did_you_mean
from mgcc_dist.common.files import write_text
from mgcc_dist.common.log import LEVELS
from mgcc_dist.common.options import Option, options_of
from mgcc_dist.common.value_types import accepts_none, choices

CONFIGS = Path(__file__).parents[1] / "configs"
Config = TypeVar("Config")


@dataclass(frozen=True)
class Setting:
    """A value as it was given, not yet parsed."""

    word: str
    file: Path | None = None
    """where it stands; None for the command line"""


@dataclass
class CommandLine:
    """What a command line asks for."""

    settings: dict[str, Setting] = field(default_factory=dict)
    """by key, the last one given"""
    words: list[str] = field(default_factory=list)
    """for argparse as they are: flags, options of several values"""
    positional: list[str] = field(default_factory=list)
    asks_for: Literal["run", "help", "help-all", "print_config"] = "run"
    log_level: str | None = None


def parse(
    config_class: type[Config], argv: Sequence[str], presets: Path | None = None, default_preset: str | None = None
) -> Config:
    """Read a `config_class` from the words of a command line.

    With `presets`, `--preset NAME` reads PRESETS/NAME.yaml; without one, `default_preset` is read.

    Raises:
        UserError: unknown key, wrong type or impossible value; the message names the key.
    """
    options = {option.key: option for option in options_of(config_class)}
    return build(config_class, options, read_command_line(options, argv, presets, default_preset))


def load(config_class: type[Config], path: Path) -> Config:
    """Read a config that `save` wrote.

    Raises:
        UserError: the file does not exist, is not YAML, or holds a key or value that `config_class` does not accept.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found. Is {path.parent} a run folder?")
    options = {option.key: option for option in options_of(config_class)}
    return build(config_class, options, CommandLine(read_settings(path, options)))


def save(config: Any, path: Path) -> None:
    """Write a dataclass config as YAML."""
    write_text(path, as_yaml(config))


def as_yaml(config: Any) -> str:
    return yaml.safe_dump(as_plain(config), sort_keys=False)


def as_plain(config: Any) -> dict[str, Any]:
    """Convert a dataclass config to what YAML and JSON hold: dicts, lists, strings, numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    keys: dict[str, Any] = {}
    for key, value in tree.items():
        keys |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return keys


def preset_names(presets: Path) -> list[str]:
    return sorted(path.stem for path in presets.glob("*.yaml"))


def read_command_line(
    options: Mapping[str, Option], argv: Sequence[str], presets: Path | None, default_preset: str | None
) -> CommandLine:
    """Sort the words of a command line, and read its preset and `--config` files.

    Raises:
        UserError: an option is unknown or lacks its value, or a file is damaged.
    """
    line, files, chosen = CommandLine(), list[Path](), list[str]()
    words = list(argv)
    while words:
        word = words.pop(0)
        if not _is_option(word):
            line.positional.append(word)
            continue
        name, equals, value = word.partition("=")
        take = partial(_take, name, value if equals else None, words)
        key = name[2:].replace("-", "_")
        if name in ("-h", "--help"):
            line.asks_for = "help"
        elif name == "--help-all":
            line.asks_for = "help-all"
        elif key == "print_config":
            line.asks_for = "print_config"
        elif key == "log_level":
            line.log_level = take(f"one of {', '.join(LEVELS)}")
        elif name == "--config":
            files.append(Path(take("a file")))
        elif name == "--preset" and presets:
            chosen.append(take("a name"))
        elif key in options:
            _add_option(line, options[key], take, [value] if equals else [], words)
        elif any(other.startswith(f"{key}.") for other in options):
            line.settings |= _settings(_yaml(take("a mapping of keys"), name), options, None, f"{key}.")
        else:
            raise SharedError(f"{name}: unknown option.{_suggestion(name, options, presets)}")
    settings: dict[str, Setting] = {}
    if presets and (preset := _preset(chosen, default_preset, presets, bool(files))):
        settings |= read_settings(presets / f"{preset}.yaml", options)
    for path in files:
        settings |= read_settings(path, options)
    line.settings = settings | line.settings
    return line


def _add_option(
    line: CommandLine, option: Option, take: Callable[[str], str], equal: list[str], words: list[str]
) -> None:
    """Add an option to `line`; its value stands after = (`equal`) or is the next of `words`."""
    if option.is_flag:
        line.words.append(option.name)
    elif "nargs" in option.argument:
        line.words += [option.name, *equal]
        while words and not equal and not _is_option(words[0]):
            line.words.append(words.pop(0))
    elif option.repeatable:
        earlier = json.loads(line.settings[option.key].word) if option.key in line.settings else []
        line.settings[option.key] = Setting(json.dumps([*earlier, take(option.expected)]))
    else:
        line.settings[option.key] = Setting(take(option.expected))


def read_settings(path: Path, options: Mapping[str, Option]) -> dict[str, Setting]:
    """Read a YAML file of keys.

    Raises:
        UserError: the file does not exist, is not YAML, or has an unknown key.
    """
    try:
        return _settings(_yaml(path.read_text(encoding="utf-8"), str(path)), options, path)
    except FileNotFoundError as error:
        raise SharedError(f"{path}: not found") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SharedError(f"{path}: cannot be read as text ({error})") from error


def build(config_class: type[Config], options: Mapping[str, Option], line: CommandLine) -> Config:
    """Parse and check the values of `line`, and build the dataclass of them.

    Raises:
        UserError: a required value is missing, or a value has the wrong type or is impossible.
    """
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    for option in options.values():
        _add(parser, option)
    settings = [f"{options[key].name}={_word(options[key], setting)}" for key, setting in line.settings.items()]
    words = [*line.positional, *line.words, *settings]
    if line.positional and not any(option.positional for option in options.values()):
        raise SharedError(f"{line.positional[0]}: unexpected argument. Options begin with --.")
    try:
        values = vars(parser.parse_args(words).as_flat())
    except (ArgumentError, ValueError, TypeError) as error:
        raise SharedError(_explain(error, options, line)) from error
    for option in options.values():
        if "nargs" in option.argument and values[option.key] in (None, []) and not option.required:
            values[option.key] = option.default
    if missing := [option for option in options.values() if option.required and values[option.key] is None]:
        names = ", ".join(f"{option.name} ({option.type_name})" for option in missing)
        raise SharedError(f"{names}: required")
    try:
        return _instance(config_class, values, "")
    except ValueError as error:
        raise SharedError(" ".join(str(error).split())) from error


def _add(parser: ArgumentParser, option: Option) -> None:
    keywords = {key: value for key, value in option.argument.items() if key != "positional"}
    kind, default = option.plain_kind, option.default
    if option.positional:
        keywords = {"nargs": "?"} | keywords
    if option.repeatable:  # `read_command_line` has made one list of them
        del keywords["action"]
    if "nargs" in keywords:
        kind = next(iter(getattr(kind, "__args__", ())), kind)  # of tuple[X, ...] and X | None argparse reads X
    if option.required:
        kind, default = kind | None, None
    if not option.is_flag:
        keywords["type"] = kind
    if "nargs" not in keywords:  # `build` fills in the defaults of those
        keywords["default"] = default
    parser.add_argument(option.name, **keywords)


def _instance(config_class: type[Config], values: Mapping[str, Any], prefix: str) -> Config:
    hints = get_type_hints(config_class)
    return config_class(
        **{
            each.name: _instance(hints[each.name], values, f"{prefix}{each.name}.")
            if dataclasses.is_dataclass(hints[each.name])
            else _builtin(values[prefix + each.name])
            for each in dataclasses.fields(config_class)  # type: ignore[arg-type]
        }
    )


def _builtin(value: Any) -> Any:
    """Convert jsonargparse's restricted numbers to plain ones, which YAML and checkpoints (weights_only) accept."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_builtin, value))
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def _preset(chosen: list[str], default: str | None, presets: Path, has_files: bool) -> str | None:
    if len(chosen) > 1:
        raise SharedError(f"--preset: given twice ({', '.join(chosen)}). Give one, and change single keys after it.")
    if not chosen:
        return None if has_files else default
    names = preset_names(presets)
    if chosen[0] not in names:
        hint = did_you_mean(chosen[0], names) or f" Choose one of {', '.join(names)}."
        raise SharedError(f"--preset {chosen[0]}: unknown preset.{hint}")
    return chosen[0]


def _is_option(word: str) -> bool:
    return re.match(r"-[^\d.]", word) is not None


def _take(name: str, value: str | None, words: list[str], kind: str) -> str:
    """The value of option `name`: what follows its =, or the next word."""
    if value is not None:
        return value
    if not words or _is_option(words[0]):
        raise SharedError(f"{name}: a value is missing. Give {kind}.")
    return words.pop(0)


def _suggestion(name: str, options: Mapping[str, Option], presets: Path | None) -> str:
    known = [option.name[2:] for option in options.values() if not option.positional]
    known += ["help", "help-all", "log-level", "config", *(["preset", "print_config"] if presets else [])]
    return did_you_mean(name.lstrip("-"), known, "--") or " --help-all lists all options."


def _yaml(text: str, source: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise SharedError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise SharedError(f"{source}: expected a mapping of keys, got {content!r}")
    return content


def _settings(
    tree: Mapping[Any, Any], options: Mapping[str, Option], file: Path | None, prefix: str = ""
) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    where = f"{file}: " if file else ""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in options:
            settings[key] = Setting(value if isinstance(value, str) else json.dumps(value), file)
        elif not any(other.startswith(f"{key}.") for other in options):
            raise SharedError(f"{where}{key}: unknown key.{did_you_mean(key, options)}")
        elif isinstance(value, dict):
            settings |= _settings(value, options, file, f"{key}.")
        elif value is not None:
            raise SharedError(f"{where}{key}: expected a mapping of keys, got {value!r}")
    return settings


def _word(option: Option, setting: Setting) -> str:
    says_none = setting.word == "none" and accepts_none(option.plain_kind) and "none" not in choices(option.kind)
    return "null" if says_none else setting.word


def _explain(error: Exception, options: Mapping[str, Option], line: CommandLine) -> str:
    """One line for what jsonargparse says."""
    said = " ".join(str(error.message if isinstance(error, ArgumentError) else error).split())
    named = re.match(r'Parser key "([^"]+)"', said)
    if not named or named[1] not in options:
        return said.replace("unrecognized arguments:", "unexpected argument")
    option = options[named[1]]
    setting = line.settings.get(option.key)
    values = [setting.word] if setting else _given(option, line)
    where = f"{setting.file}: " if setting and setting.file else ""
    suggestion = did_you_mean(values[-1], choices(option.kind)) if values else ""
    message = f"{where}{option.key}: expected {option.expected}, got {' '.join(map(repr, values))}"
    return f"{message}.{suggestion}" if suggestion else message


def _given(option: Option, line: CommandLine) -> list[str]:
    """The words given for a positional argument or an option of several values."""
    if option.positional:
        return line.positional
    words = iter(line.words)
    given: list[str] = []
    for word in words:
        if _is_option(word):
            name, _, value = word.partition("=")
            collecting = name == option.name
            given += [value] if collecting and value else []
        elif collecting:
            given.append(word)
    return given
