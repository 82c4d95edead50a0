"""The text of `--help` and `--help-all`."""

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from mgcc_dist.common.config import Setting, Settings
from mgcc_dist.common.log import LEVELS
from mgcc_dist.common.options import Option, headings_of
from mgcc_dist.common.presets import preset_names

if TYPE_CHECKING:
    from mgcc_dist.common.program import Command

INDENT = 26
"""column at which the texts begin"""


def command_help(name: str, command: "Command", settings: Settings, everything: bool) -> str:
    """The help of one command, with the values of `settings` (a preset's) as defaults.

    Without `everything`, the options of `command.common`, if it names any, with the first clause of their texts.
    """
    options, given = settings.options, settings.given
    brief = bool(command.common) and not everything
    listed = (option for option in options.values() if not option.recorded)
    shown = [option for option in listed if not brief or _is_common(option, command, settings)]
    arguments = [option for option in shown if option.positional]
    named = [option for option in shown if not option.positional]
    needed = [each for each in named if each.required and each.key not in given]
    usage = " ".join([name, *map(_usage, [*arguments, *needed])])
    paragraphs = (command.description or command.summary).strip().split("\n\n")
    blocks = [f"usage: {usage} [options]", "\n\n".join(paragraphs[:2] if brief else paragraphs)]
    if arguments:
        blocks.append(_block("arguments", ((each.name, _text(each, given, brief)) for each in arguments)))
    headings = {"": "options"} | headings_of(command.config, settings.chosen)
    for section in dict.fromkeys(option.section for option in named):
        rows = [(each.name, _text(each, given, brief)) for each in named if each.section == section]
        blocks.append(_block(headings[section], rows))
    blocks.append(_block("more", _more(command, brief)))
    return "\n\n".join(blocks)


def _is_common(option: Option, command: "Command", settings: Settings) -> bool:
    chosen = (f"{section}." for section in command.common if section in settings.sections)
    return option.key in command.common or option.key.startswith(tuple(chosen))


def list_commands(heading: str, summaries: Iterable[tuple[str, str]]) -> str:
    """One line per command."""
    return _block(heading, summaries)


def _more(command: "Command", brief: bool) -> Iterator[tuple[str, str]]:
    if command.presets:
        names = ", ".join(preset_names(command.presets))
        yield "--preset NAME", f"start from a shipped config: {names} [default: {command.default_preset}]"
    if command.config_files:
        over = "they win over the preset, and options over both" if command.presets else "options win over them"
        yield "--config FILE", f"read keys from a YAML file; {over}"
        yield "--print_config", "print the resulting config as YAML and exit"
    yield "--import MODULE", "import a module or Python file that registers components; repeatable"
    yield "--log-level LEVEL", f"one of {', '.join(LEVELS)} [default: MGCC_LOG_LEVEL, else info]"
    if brief:
        yield "--help-all", "show all options, and more about each"
    if command.presets:
        yield "--help", "show this help; after --preset NAME with the defaults of that preset"


def _usage(option: Option) -> str:
    if option.positional:
        name = option.key.upper()
        return name if option.required else f"[{name} ...]"
    return f"{option.name} {option.type_name.upper()}"


def _text(option: Option, given: Mapping[str, Setting], brief: bool) -> str:
    text = _first_clause(option.text) if brief else option.text
    if option.is_flag:
        return text
    if option.required and option.key not in given:
        default = "required"
    else:
        value = given[option.key].value if option.key in given else option.default
        default = f"default: {_in_words(value)}"
    type_name = option.type_name.removesuffix(" or none") if default == "default: none" else option.type_name
    return f"{text} [{type_name}, {default}]"


def _first_clause(text: str) -> str:
    """Cut `text` at its first colon, semicolon or full stop, without parentheses, but keep the paper's value."""
    clause = re.match(r"(?:\([^)]*\)|[^(;:.]|[;:.](?! ))*", text)[0]  # type: ignore[index]
    paper = re.search(r"\((?:[^()]*; )?(paper: [^;()]*)[^()]*\)", text[len(clause) :])
    clause = re.sub(r" \((?![^()]*paper: )[^()]*\)", "", clause)
    return f"{clause} ({paper[1]})" if paper else clause


def _in_words(value: object) -> str:
    if value in (None, (), [], "", "null", "[]"):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, (tuple, list)) else str(value)


def _block(heading: str, rows: Iterable[tuple[str, str]]) -> str:
    width = min(100, shutil.get_terminal_size((100, 0)).columns)
    lines = [f"{heading}:"]
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - INDENT, break_long_words=False, break_on_hyphens=False)
        first = f"  {name}"
        if len(first) > INDENT - 2:
            lines.append(first)
            first = ""
        for line in wrapped:
            lines.append(f"{first:{INDENT}}{line}")
            first = ""
    return "\n".join(lines)
