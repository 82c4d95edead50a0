"""Typed dataclass configs read by jsonargparse: presets, YAML files, `--section.key value` over them.

A program calls `parse(LdmConfig, "ldm", "what it does", presets=CONFIGS / "ldm", default_preset="demo")` and gets an
instance of its dataclass. The docstring under a field is its help text. `save` writes the config into a run folder.
"""

import dataclasses
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_parsing_settings,
)

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import write_text

if TYPE_CHECKING:  # to a type checker these are plain numbers; at run time jsonargparse refuses values out of range
    NonNegativeFloat = float
    NonNegativeInt = int
    PositiveFloat = float
    PositiveInt = int
    UnitInterval = float
else:
    from jsonargparse.typing import ClosedUnitInterval as UnitInterval
    from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

__all__ = [
    "CONFIGS",
    "HelpFormatter",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "UnitInterval",
    "as_plain",
    "flatten",
    "load",
    "parse",
    "save",
]

CONFIGS = Path(__file__).parents[1] / "configs"
Config = TypeVar("Config")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description; adds type and default to each option."""


def parse(
    config_class: type[Config],
    program: str,
    description: str,
    presets: Path | None = None,
    default_preset: str | None = None,
    argv: Sequence[str] | None = None,
) -> Config:
    """Read a `config_class` from the command line (`argv`, or that of the process).

    With `presets`, `--preset NAME` stands for `--config PRESETS/NAME.yaml`, and without either `default_preset` is
    read. What stands later on the line wins over what stands before it.

    Raises:
        UserError: unknown key, wrong type or impossible value; the message names the key.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if presets:
        names = sorted(path.stem for path in presets.glob("*.yaml"))
        description += f" --preset NAME reads a shipped config: {', '.join(names)} (default: {default_preset})."
        argv = _expand_presets(argv, presets, names)
        if default_preset and not any(map(_is_config, argv)):
            argv = ["--config", str(presets / f"{default_preset}.yaml"), *argv]
    _check_files(argv)
    parser = _parser(config_class, program, description)
    try:
        return _build(config_class, parser, parser.parse_args(argv))
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_one_line(error)) from error


def load(config_class: type[Config], path: Path) -> Config:
    """Read a config that `save` wrote.

    Raises:
        UserError: the file is absent, is not YAML, or holds a key or value that `config_class` does not accept.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there; is {path.parent} a run folder?")
    parser = _parser(config_class, path.name, "")
    try:
        return _build(config_class, parser, parser.parse_path(str(path)))
    except (ArgumentError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error


def save(config: Any, path: Path) -> None:
    """Write a dataclass config as YAML."""
    write_text(path, yaml.safe_dump(as_plain(config), sort_keys=False))


def as_plain(config: Any) -> dict[str, Any]:
    """A dataclass config as what YAML and JSON hold: dicts, lists, strings, numbers."""

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


def _parser(config_class: type, program: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(prog=program, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the keys below")
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def _build(config_class: type[Config], parser: ArgumentParser, namespace: Namespace) -> Config:
    values = vars(parser.instantiate(namespace))
    return config_class(**{key: _builtin(value) for key, value in values.items() if key != "config"})


def _builtin(value: Any) -> Any:
    """Numbers of jsonargparse's restricted types as plain ones, which YAML and checkpoints (weights_only) know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value))
        return dataclasses.replace(value, **{name: _builtin(getattr(value, name)) for name in fields})
    if isinstance(value, tuple):
        return tuple(map(_builtin, value))
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def _expand_presets(argv: list[str], presets: Path, names: list[str]) -> list[str]:
    """Write `--preset NAME` (or `--preset=NAME`) as `--config PRESETS/NAME.yaml`."""
    expanded: list[str] = []
    words = iter(argv)
    for word in words:
        flag, _, name = word.partition("=")
        if flag != "--preset":
            expanded.append(word)
            continue
        name = name or next(words, "")
        if name not in names:
            raise UserError(f"preset {name!r} is not known; choose one of {', '.join(names)}")
        expanded += ["--config", str(presets / f"{name}.yaml")]
    return expanded


def _check_files(argv: list[str]) -> None:
    """Raise UserError for a `--config` file that is not YAML; what jsonargparse says of one does not name it."""
    names = [
        word.partition("=")[2] or after for word, after in zip(argv, [*argv[1:], ""], strict=True) if _is_config(word)
    ]
    for path in map(Path, names):
        try:
            if path.is_file():
                yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not YAML: {_one_line(error)}") from error


def _is_config(word: str) -> bool:
    return word.partition("=")[0] == "--config"


def _one_line(error: Exception) -> str:
    text = error.message if isinstance(error, ArgumentError) else str(error)
    return " ".join(str(text).split())
