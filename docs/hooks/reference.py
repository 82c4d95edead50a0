"""MkDocs hook: fill the reference pages from the code when the site is built.

A page holds markers such as `<!-- config: mgcc_dist.ldm.LdmConfig -->`, which become tables of the keys of that
config dataclass, and `<!-- help: segment -->`, which become what `mgcc segment --help` prints.
"""

import dataclasses
import re
import subprocess
import sys
import types
import typing
from importlib import import_module

from docstring_parser import parse_from_object

CONFIG = re.compile(r"<!-- config: ([\w.]+) -->")
HELP = re.compile(r"<!-- help: ([\w -]+) -->")
MISSING = dataclasses.MISSING


def on_page_markdown(markdown, **_):
    """Called by MkDocs for every page."""
    markdown = CONFIG.sub(lambda match: config_tables(match[1]), markdown)
    return HELP.sub(lambda match: help_text(match[1]), markdown)


def config_tables(path):
    """One table per section of the config dataclass at the dotted `path`: key, type, default, meaning."""
    module, _, name = path.rpartition(".")
    sections = {}
    for key, type_name, default, meaning in keys_of(getattr(import_module(module), name)):
        section = key.rpartition(".")[0]
        sections.setdefault(section, []).append((key, type_name, default, meaning))
    blocks = []
    for section, rows in sections.items():
        blocks.append(f"### `{section}`\n" if section else "### Top level\n")
        blocks.append("| key | type | default | meaning |\n| --- | --- | --- | --- |")
        blocks += [
            f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(meaning)} |" for key, kind, default, meaning in rows
        ]
        blocks.append("")
    return "\n".join(blocks)


def keys_of(config_class, prefix=""):
    """(key, type, default, meaning) of every key of a config dataclass, nested sections after plain keys."""
    hints = typing.get_type_hints(config_class)
    meanings = {each.arg_name: each.description for each in parse_from_object(config_class).params}
    plain, nested = [], []
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            nested += keys_of(kind, f"{prefix}{field.name}.")
        else:
            meaning = " ".join((meanings.get(field.name) or "").split())
            plain.append((prefix + field.name, type_name(kind), _default(field), meaning))
    return plain + nested


def type_name(kind):
    """A type in words: "float >0", "list of int", "one of a, b"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if each is type(None) else type_name(each) for each in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(f"`{each}`" for each in arguments)
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if " restricted to be " in (kind.__doc__ or ""):  # jsonargparse's numbers: "int restricted to be >0"
        return kind.__doc__.replace(" restricted to be", "")
    return getattr(kind, "__name__", str(kind))


def help_text(command):
    """What `mgcc COMMAND --help` prints, as a code block."""
    words = [sys.executable, "-m", "mgcc_dist", *command.split(), "--help"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return f"```text\n{printed.rstrip()}\n```"


def _default(field):
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is MISSING:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _cell(text):
    return text.replace("|", "\\|").replace("\n", " ")
