"""Read a command line: `--section.key value`, `--config FILE`, `--preset NAME`, flags and positional arguments."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mgcc_dist.common.config import Config, Layer, flatten, read_layer, read_yaml, resolve
from mgcc_dist.common.errors import SharedError, did_you_mean
from mgcc_dist.common.log import LEVELS
from mgcc_dist.common.options import Option, component_sections, options_of
from mgcc_dist.common.presets import preset_names, read_preset


@dataclass
class CommandLine:
    """What a command line asks for."""

    layers: list[Layer] = field(default_factory=list)
    """preset, files, the line's own keys"""
    preset: str | None = None
    """name of the preset, given or default; None without one"""
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
    return resolve(config_class, read_command_line(config_class, argv, presets, default_preset).layers)


def read_command_line(
    config_class: type, argv: Sequence[str], presets: Path | None, default_preset: str | None
) -> CommandLine:
    """Sort the words of a command line, and read its preset and `--config` files.

    Raises:
        UserError: an option is unknown or lacks its value, or a file is damaged.
    """
    options = {option.key: option for option in options_of(config_class)}
    aliases = {option.alias: key for key, option in options.items() if option.alias}
    components = component_sections(config_class)
    line, files, chosen, positional = CommandLine(), list[Path](), list[str](), list[str]()
    own: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":  # after the module's name it keeps a launcher from reading the options that follow
            continue
        if not _is_option(word):
            positional.append(word)
            continue
        name, equals, value = word.partition("=")
        take = partial(_take, name, value if equals else None, words)
        key = name[2:].replace("-", "_")
        key = aliases.get(key, key)
        section = next((each for each in components if f"{key}.".startswith(f"{each}.")), None)
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
        elif key in options and options[key].has_name:
            if key in own and options[key].alias:
                raise SharedError(f"{name}: given twice, --{options[key].alias} is the same as --{key}. Give one.")
            own[key] = _value(options[key], own.get(key), take, [value] if equals else [], words)
        elif section:  # its keys depend on the chosen component, so `resolve` checks them
            given = take("a name or a mapping of keys" if key in components else "a value")
            if given.startswith("{"):
                own |= flatten(read_yaml(given, name), f"{key}.")
            else:
                own[f"{key}.name" if key in components else key] = given
        elif any(other.startswith(f"{key}.") for other in options):
            own |= flatten(read_yaml(take("a mapping of keys"), name), f"{key}.")
        else:
            raise SharedError(f"{name}: unknown option.{_suggestion(name, options, presets)}")
    unnamed = _positional(options, positional)
    if twice := next((key for key in unnamed if key in own), None):
        raise SharedError(f"--{twice}: given twice, with and without --{twice}. Give all {twice} in one place.")
    own |= unnamed
    if presets and (preset := _preset(chosen, default_preset, presets, bool(files))):
        line.preset = preset
        line.layers += read_preset(presets, presets / f"{preset}.yaml")
    for path in files:
        line.layers += read_preset(presets, path) if presets else [read_layer(path)]
    line.layers.append(Layer(own))
    return line


def _value(option: Option, earlier: Any, take: Callable[[str], str], equal: list[str], words: list[str]) -> Any:
    """The value of an option: after = (`equal`), or in `words`. `earlier` is what it was given before on this line."""
    if option.is_flag:
        return True
    if option.repeatable:
        return [*(earlier or []), take(option.expected)]
    nargs = option.argument.get("nargs")
    if nargs == "?" and not equal and (not words or _is_option(words[0])):
        return option.argument["const"]
    if nargs in ("+", "*"):
        several = equal or [take(option.expected)]
        while words and not equal and not _is_option(words[0]):
            several.append(words.pop(0))
        return several
    return take(option.expected)


def _positional(options: Mapping[str, Option], words: Sequence[str]) -> dict[str, Any]:
    """Assign the words that belong to no option; the last positional option may take several."""
    given: dict[str, Any] = {}
    remaining = list(words)
    for option in (each for each in options.values() if each.positional):
        if option.takes_several:
            given |= {option.key: remaining} if remaining else {}
            return given
        if remaining:
            given[option.key] = remaining.pop(0)
    if remaining:
        raise SharedError(f"{remaining[0]}: unexpected argument. Options begin with --.")
    return given


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
    known = [option.name.removeprefix("--") for option in options.values() if option.has_name]
    known += [option.alias for option in options.values() if option.alias]
    known += ["help", "help-all", "log-level", "config", "import", *(["preset", "print_config"] if presets else [])]
    return did_you_mean(name.lstrip("-"), known, "--") or " --help-all lists all options."
