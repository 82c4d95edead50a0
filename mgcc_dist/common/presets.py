"""Presets: YAML files of keys, shipped in configs/ or a user's own, which may name another as their `base`."""

from collections.abc import Iterator
from pathlib import Path

from mgcc_dist.common.config import Layer, read_layer
from mgcc_dist.common.errors import SharedError, did_you_mean

BASE = "base"


def preset_names(presets: Path) -> list[str]:
    """Return the names of the presets in a folder, sorted."""
    return sorted(path.stem for path in presets.glob("*.yaml"))


def is_file(name: str) -> bool:
    """Return whether a preset is given by its file and not by its name."""
    return name.endswith((".yaml", ".yml"))


def find_preset(presets: Path, name: str) -> Path:
    """Return the preset of that name in the folder `presets`, or the file at that path.

    Raises:
        UserError: there is no such preset. A file that does not exist is reported by `read_preset`.
    """
    names = preset_names(presets)
    if name not in names and not is_file(name):
        hint = did_you_mean(name, names) or f" Choose one of {', '.join(names)}."
        raise SharedError(f"{name}: unknown preset.{hint}")
    return presets / f"{name}.yaml" if name in names else Path(name)


def read_preset(presets: Path, path: Path) -> list[Layer]:
    """Read a YAML file of keys and those that it has as `base`, the outermost base first.

    A base is the name of a preset in the folder `presets`, or a file next to the one that names it.

    Raises:
        UserError: a file does not exist or is not YAML, or a base is its own base.
    """
    return [layer for layer, _ in _with_bases(presets, path)][::-1]


def base_names(presets: Path, name: str) -> list[str]:
    """Return the names (of files, the stems) of a preset's bases and of the preset, the outermost base first."""
    return [found.stem for _, found in _with_bases(presets, find_preset(presets, name))][::-1]


def _with_bases(presets: Path, path: Path) -> Iterator[tuple[Layer, Path]]:
    seen: list[Path] = []
    while True:
        layer = read_layer(path)
        tree = dict(layer.tree)
        base = tree.pop(BASE, None)
        yield Layer(tree, layer.source), path
        seen.append(path.resolve())
        if base is None:
            return
        if not isinstance(base, str):
            raise SharedError(f"{path}: base: expected the name or the file of a preset, got {base!r}")
        nearby = path.parent / base
        try:
            path = nearby if is_file(base) and nearby.is_file() else find_preset(presets, base)
        except SharedError as error:
            raise SharedError(f"{path}: base: {error}") from error
        if path.resolve() in seen:
            raise SharedError(f"{path}: base: a preset is its own base")
