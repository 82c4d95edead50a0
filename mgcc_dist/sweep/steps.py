"""The steps that prepare a sweep's data, with the resolved configs of their programs."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from mgcc_dist.common.command_line import read_command_line
from mgcc_dist.common.components import imports_of, imports_of_module, take_imports
from mgcc_dist.common.config import resolve
from mgcc_dist.common.errors import UserError, did_you_mean
from mgcc_dist.sweep.placeholders import substitute
from mgcc_dist.sweep.schema import Preparation, SweepFile, slug

PROGRAMS = ("shards", "ldm", "segment")


@dataclass(frozen=True)
class StepProgram:
    """What a step runs."""

    words: tuple[str, ...]
    """program and subcommand: ("ldm",), ("shards", "split")"""
    options: tuple[str, ...]
    """as the sweep file gives them"""
    preset: str | None
    """name of the preset that the options start from, if the program has presets"""
    config: Any
    """what the program makes of the options"""
    imports: tuple[str, ...]
    """modules and files of the plugins that it uses"""

    def command(self, options: Sequence[str]) -> list[str]:
        """Return the arguments after `python` that start the program with `options`."""
        program, *subcommand = self.words
        imports = (f"--import={module}" for module in self.imports)
        return ["-m", f"mgcc_dist.{program}", *imports, *subcommand, *options]


@dataclass(frozen=True)
class SweepStep:
    """A program that must finish before runs can start: shards, a split file, one stage of a diffusion model."""

    name: str
    """data set, entry of `prepare`, stage and split: "busi/shards", "busi/ldm-autoencoder-split_1", ..."""
    kind: str
    """entry and stage, the same for all splits: "shards", "ldm autoencoder", ..."""
    program: StepProgram
    output: Path
    """the file whose existence marks the step as done"""
    needs: tuple[str, ...]
    """names of the steps that must finish before it starts, direct and indirect ones"""
    resources: dict[str, Any]

    def command(self) -> list[str]:
        """Return the arguments after `python` that start this step, as a person would."""
        return self.program.command(self.program.options)

    @property
    def config(self) -> Any:
        return self.program.config


def expand_steps(
    file: SweepFile, pairs: Sequence[tuple[int, int]]
) -> tuple[list[SweepStep], dict[tuple[str, str, int], tuple[str, ...]]]:
    """Return the steps, and by data set, entry and seed the names of an entry's steps after those that they need."""
    steps: dict[tuple[str, ...], SweepStep] = {}
    chains: dict[tuple[str, str, int], tuple[str, ...]] = {}
    for name, dataset in file.datasets.items():
        for seed, split in pairs:
            for entry, preparation in dataset.prepare.items():
                needed = dict.fromkeys(step for each in preparation.needs for step in chains[name, each, seed])
                for step in _stages(file, name, entry, preparation, split, seed):
                    # Steps with the same command are one; it needs what any of them needs.
                    command = (*step.program.words, *step.program.options)
                    same = steps.get(command, step)
                    needs = dict.fromkeys([*same.needs, *needed])
                    steps[command] = replace(same, needs=tuple(needs))
                    needed[same.name] = None
                chains[name, entry, seed] = tuple(needed)
    return list(steps.values()), chains


def _stages(
    file: SweepFile, dataset: str, entry: str, preparation: Preparation, split: int, seed: int
) -> Iterator[SweepStep]:
    """Yield one step per stage of an entry of `prepare`, for one split and seed."""
    source = f"{file.path}: datasets.{dataset}.prepare.{entry}"
    numbers = {"split": split, "seed": seed}
    used = [f"{key}_{value}" for key, value in numbers.items() if f"{{{key}}}" in preparation.run]
    for stage, output in preparation.makes.items():
        names = numbers | {"stage": stage}
        try:
            words = shlex.split(preparation.run)
        except ValueError as error:
            raise UserError(f"{source}.run: {error} in {preparation.run!r}") from error
        kind = f"{entry} {stage}".strip()
        yield SweepStep(
            "-".join([f"{slug(dataset)}/{slug(kind)}", *used]),
            kind,
            _read_program(source, tuple(substitute(source, word, **names) for word in words)),
            Path(substitute(source, output, **names)),
            (),
            preparation.resources,
        )


def _read_program(source: str, words: tuple[str, ...]) -> StepProgram:
    try:
        return read_program(words)
    except UserError as error:
        raise UserError(f"{source}.run: {error}") from error


@cache
def read_program(words: tuple[str, ...]) -> StepProgram:
    """Read the command line of a step, without `mgcc`.

    Raises:
        UserError: there is no such program or command, or an option is wrong.
    """
    program, *rest = take_imports(words) or [""]
    if program not in PROGRAMS:
        raise UserError(f"{program}: unknown program. A step runs one of {', '.join(PROGRAMS)}.")
    found = import_module(f"mgcc_dist.{program}").PROGRAM
    subcommand = rest[:1] if rest and rest[0] in found.commands else []
    command = found.commands[rest[0]] if subcommand else found.default
    if command is None:
        given = rest[0] if rest else "no command"
        hint = did_you_mean(given, found.commands) or f" Choose one of {', '.join(found.commands)}."
        raise UserError(f"{program}: {given}: unknown command.{hint}")
    options = rest[len(subcommand) :]
    line = read_command_line(command.config, options, command.presets, command.default_preset)
    config = resolve(command.config, line.layers)
    imports = sorted({*imports_of(config), *imports_of_module(command.module)})
    return StepProgram((program, *subcommand), tuple(options), line.preset, config, tuple(imports))
