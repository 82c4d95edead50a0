"""MkDocs hook: fill the reference pages from the code when the site is built.

A page holds markers: `<!-- config: mgcc_dist.ldm.LdmConfig -->` becomes tables of the keys of that config dataclass and
of the components that it can choose, `<!-- help: segment -->` what `mgcc segment --help` prints.
"""

import os
import re
import subprocess
import sys
from importlib import import_module
from itertools import groupby

from mgcc_dist.common.options import component_sections, headings_of, options_of

CONFIG = re.compile(r"<!-- config: ([\w.]+) -->")
HELP = re.compile(r"<!-- help: ([\w -]+) -->")


def on_page_markdown(markdown, **_):
    """Called by MkDocs for every page."""
    markdown = CONFIG.sub(lambda match: config_tables(match[1]), markdown)
    return HELP.sub(lambda match: help_block(match[1]), markdown)


def config_tables(path):
    """Render one table per section, and per component of a section, of the config dataclass at the dotted `path`."""
    module, _, name = path.rpartition(".")
    config_class = getattr(import_module(module), name)
    headings = headings_of(config_class)
    registries = component_sections(config_class)
    fixed = [
        each for each in options_of(config_class) if not each.key.startswith(tuple(f"{key}." for key in registries))
    ]
    lines = []
    for section, options in groupby(fixed, key=lambda option: option.section):
        lines += [f"### {headings.get(section, 'top level').partition(' (')[0].capitalize()}", "", *table(options)]
    for section, registry in registries.items():
        for component in registry.components():
            lines += [f"### `{section}: {component.name}`", "", component.summary, ""]
            lines += table(options_of(component.config, prefix=f"{section}."))
    return "\n".join(lines)


def table(options):
    """The lines of a table: key, type, default, meaning; without the keys that only programs set."""
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for option in (each for each in options if not each.recorded):
        cells = (f"`{option.key}`", option.type_name, default(option), option.text)
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return [*lines, ""]


def default(option):
    if option.required:
        return "required"
    if option.default in (None, ()):
        return "none"
    if isinstance(option.default, bool):
        return str(option.default).lower()
    return str(list(option.default) if isinstance(option.default, tuple) else option.default)


def help_block(command):
    """Run `mgcc COMMAND --help` and render what it prints."""
    words = [sys.executable, "-m", "mgcc_dist", *command.split(), "--help"]
    wide = {**os.environ, "COLUMNS": "100"}
    printed = subprocess.run(words, capture_output=True, text=True, check=True, env=wide).stdout
    return f"```text\n{printed.rstrip()}\n```"
