"""List what can be chosen by name: networks, methods, data sets, presets, sweeps, shipped models.

    mgcc list methods
    mgcc list networks --import ./my_network.py

Components of installed plugins and of `--import` are listed too, with the module that they come from.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from mgcc_dist.common.components import Registry, load_installed_plugins
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import run_program
from mgcc_dist.common.files import read_object
from mgcc_dist.common.options import argument
from mgcc_dist.common.program import Command, Program
from mgcc_dist.data.readers.registry import READERS
from mgcc_dist.diffusion.config import AUTOENCODERS, DENOISERS
from mgcc_dist.methods.config import METHODS
from mgcc_dist.models.config import NETWORKS
from mgcc_dist.train.config import OPTIMIZERS
from mgcc_dist.train.initial_weights import MODEL, shipped_models

Kind = Literal[
    "methods", "networks", "denoisers", "autoencoders", "optimizers", "datasets", "presets", "sweeps", "models"
]
REGISTRIES: Mapping[str, Registry[Any]] = {
    "methods": METHODS,
    "networks": NETWORKS,
    "denoisers": DENOISERS,
    "autoencoders": AUTOENCODERS,
    "optimizers": OPTIMIZERS,
    "datasets": READERS,
}


@dataclass(frozen=True)
class ListConfig:
    kind: Kind = argument(positional=True)
    """what to list"""


def run(config: ListConfig) -> None:
    """Print a line per name."""
    load_installed_plugins()
    if config.kind in REGISTRIES:
        for component in REGISTRIES[config.kind].components():
            origin = f" [{component.plugin}]" if component.plugin else ""
            print(_line(component.name, component.summary + origin))
    else:
        for name, summary in _models() if config.kind == "models" else _shipped(config.kind):
            print(_line(name, summary))


def _line(name: str, summary: str) -> str:
    return f"{name:24} {summary}"


def _models() -> Iterator[tuple[str, str]]:
    """Yield the shipped models, with what they are."""
    for name, folder in shipped_models().items():
        yield name, read_object(folder / MODEL)["summary"]


def _shipped(kind: str) -> Iterator[tuple[str, str]]:
    """Yield the shipped YAML files, with the first sentence of the comment that each begins with."""
    folders = {"sweeps": CONFIGS / "sweeps"} if kind == "sweeps" else {p: CONFIGS / p for p in ("segment", "ldm")}
    for program, folder in folders.items():
        for path in sorted(folder.glob("*.yaml")):
            comment = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
            first = " ".join(line.removeprefix("#").strip() for line in comment).partition(". ")[0].rstrip(".")
            yield path.stem, first if kind == "sweeps" else f"{first} ({program})"


PROGRAM = Program("list", __doc__, Command(ListConfig, run, "list what can be chosen by name", __doc__))
main = PROGRAM.main

if __name__ == "__main__":
    run_program("list", main)
