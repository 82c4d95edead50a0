"""Programs: a command line, a config dataclass, and a function that runs it.

    PROGRAM = Program("segment", __doc__, default=Command(SegmentConfig, run, "train a run", presets=...))
    main = PROGRAM.main

Modules that a program file imports at the top must not import torch: a typo or `--help` is then answered at once.
`run` imports what it needs when it is called.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgcc_dist.common.command_line import read_command_line
from mgcc_dist.common.components import take_imports
from mgcc_dist.common.config import as_yaml, build, settings_of
from mgcc_dist.common.errors import SharedError, did_you_mean
from mgcc_dist.common.help import command_help, list_commands
from mgcc_dist.common.log import configure_logging


@dataclass(frozen=True)
class Command:
    """A program, or one of its subcommands."""

    config: type
    """dataclass whose fields are the options"""
    run: Callable[[Any], None]
    """gets an instance of it"""
    summary: str
    """one line, for a list of commands"""
    description: str = ""
    """what `--help` begins with; the summary if empty"""
    presets: Path | None = None
    """folder of the YAML files that `--preset` names"""
    default_preset: str | None = None
    common: tuple[str, ...] = ()
    """keys of the options that `--help` shows, and sections whose chosen component's keys it shows; `--help-all` shows
    the others too. Empty: all"""
    several_processes: bool = False
    """whether the ranks of a launcher divide the work; a command that does not would write every file once per rank"""
    module: str = ""
    """module that adds it to the program, for one of a plugin"""
    config_files: bool = False
    """whether `--config` and `--print_config` are worth a line of help"""

    def main(self, name: str, argv: Sequence[str], more_help: str = "") -> None:
        """Read the words `argv` and run; or print the help, if it is asked for or nothing required is given."""
        line = read_command_line(self.config, argv, self.presets, self.default_preset)
        settings = settings_of(self.config, line.layers)
        if line.asks_for in ("help", "help-all") or (not argv and settings.missing):
            print(command_help(name, self, settings, everything=line.asks_for == "help-all") + more_help)
            return
        config: Any = build(self.config, settings)
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if ranks > 1 and not self.several_processes:
            raise SharedError(
                f"{name}: works in one process, but a launcher started {ranks}. Start it without a launcher."
            )
        if line.asks_for == "print_config":
            print(as_yaml(config), end="")
            return
        configure_logging(line.log_level)
        self.run(config)


@dataclass(frozen=True)
class Program:
    """One word of `mgcc`: a command, or several subcommands, or both."""

    name: str
    description: str
    default: Command | None = None
    """what runs when the first word is not the name of a subcommand"""
    commands: Mapping[str, Command] = field(default_factory=dict)

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Run the command that `argv` (default: the process's words) names.

        Raises:
            UserError: a word is wrong; the message says which, and the nearest that exists.
        """
        words = take_imports(sys.argv[1:] if argv is None else argv)
        first = words[0] if words else ""
        if first in self.commands:
            self.commands[first].main(f"mgcc {self.name} {first}", words[1:])
        elif self.default and (not first or first.startswith("-") or not self.commands):
            self.default.main(f"mgcc {self.name}", words, f"\n\n{self._list()}" if self.commands else "")
        elif first in ("", "-h", "--help", "--help-all"):
            print(f"usage: mgcc {self.name} COMMAND [options]\n\n{self.description.strip()}\n\n{self._list()}")
        else:
            hint = did_you_mean(first, self.commands) or f" Choose one of {', '.join(self.commands)}."
            raise SharedError(f"{first}: unknown command.{hint}")

    def _list(self) -> str:
        heading = f"commands (mgcc {self.name} COMMAND --help)"
        return list_commands(heading, ((name, command.summary) for name, command in self.commands.items()))
