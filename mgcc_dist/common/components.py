"""Components by name: networks, methods, denoisers, ... of this package and of plugins.

    @dataclass(frozen=True)
    class UNetConfig(NetworkConfig):
        '''U-Net (Ronneberger et al. 2015).'''

        name: Literal["unet"] = "unet"
        widths: tuple[int, ...] = (64, 128)

    NETWORKS.register(UNetConfig, "mgcc_dist.models.unet:UNet")

A config field whose type is a registry's base class (`network: NetworkConfig`) is a section with the keys of the
component that its `name` chooses. Shipped components are registered by import path, so that listing them and parsing
their configs imports no torch. A plugin registers its class itself, in a module that `--import MODULE` or an entry
point of the group `mgcc_dist.plugins` names.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from inspect import getdoc
from pathlib import Path
from typing import Any, Generic, TypeVar

from mgcc_dist.common.errors import SharedError, did_you_mean

ENTRY_POINTS = "mgcc_dist.plugins"
Base = TypeVar("Base")


@dataclass(frozen=True)
class Component(Generic[Base]):
    name: str
    config: type[Base]
    """dataclass of its keys; a reader, which has none, is its function"""
    implementation: Any
    """a class or function, or where to import it from: "module:NAME" """

    @property
    def summary(self) -> str:
        """The first line of the config's docstring."""
        return (getdoc(self.config) or "").partition("\n")[0]

    @property
    def plugin(self) -> str:
        """The module that registered it; "" for a component of this package."""
        module = self.config.__module__
        return "" if module.split(".")[0] == "mgcc_dist" else module

    def load(self) -> Any:
        """Return the implementation, imported if need be."""
        if not isinstance(self.implementation, str):
            return self.implementation
        module, _, name = self.implementation.partition(":")
        return getattr(import_module(module), name)


class Registry(Generic[Base]):
    """Components of one kind, whose configs derive from `base`."""

    def __init__(self, kind: str, base: type[Base], default: str = "") -> None:
        """`default` is the name of the component of a section that chooses none."""
        self.kind = kind
        self.base = base
        self._default = default
        self._components: dict[str, Component[Base]] = {}
        _REGISTRIES[base] = self

    def register(self, config: type[Base], implementation: Any) -> None:
        """Add a component, named by the default of its config's field `name`.

        Raises:
            UserError: there is another component of this name.
        """
        name = next(field.default for field in fields(config) if field.name == "name")  # type: ignore[arg-type]
        self._add(str(name), config, implementation)

    def register_function(self, function: Any) -> Any:
        """Add a component without keys, named and described like its function; also works as a decorator.

        Raises:
            UserError: there is another component of this name.
        """
        self._add(function.__name__, function, function)
        return function

    def _add(self, name: str, config: Any, implementation: Any) -> None:
        if name in self._components:
            first = self._components[name].config.__module__
            raise SharedError(
                f"{config.__module__}: {self.kind} {name!r} is already registered by {first}. Choose another name."
            )
        self._components[name] = Component(name, config, implementation)

    def components(self) -> list[Component[Base]]:
        return list(self._components.values())

    def names(self) -> list[str]:
        return list(self._components)

    def find(self, name: str) -> Component[Base] | None:
        """Return a component by name; one that is not known yet may come from an installed plugin."""
        if name not in self._components:
            load_installed_plugins()
        return self._components.get(name)

    def get(self, name: str) -> Component[Base]:
        """Return a component by name.

        Raises:
            UserError: there is none.
        """
        component = self.find(name)
        if component is None:
            hint = did_you_mean(name, self._components) or f" Choose one of {', '.join(self._components)}."
            raise SharedError(f"unknown {self.kind} {name!r}.{hint} A plugin's needs --import MODULE.")
        return component

    def default(self) -> Component[Base]:
        return self._components[self._default]

    def load(self, config: Base) -> Any:
        """Return the implementation that `config` configures."""
        return self.get(config.name).load()  # type: ignore[attr-defined]


def component_keys(config: Any) -> dict[str, Any]:
    """Return the keys of a component's config and their values, without its name."""
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name != "name"}


_REGISTRIES: dict[type, Registry[Any]] = {}
_IMPORTED: dict[str, str] = {}
"""what `import_plugin` has imported: the module's name, and the module or file that it was given as"""


def registry_of(kind: Any) -> Registry[Any] | None:
    """Return the registry whose base class `kind` is; None for other types."""
    return _REGISTRIES.get(kind) if isinstance(kind, type) else None


@cache
def load_installed_plugins() -> None:
    """Import the modules of the entry points `mgcc_dist.plugins`, which register their components.

    Raises:
        UserError: one of them cannot be imported.
    """
    for entry in sorted(entry_points(group=ENTRY_POINTS)):
        try:
            entry.load()
        except Exception as error:
            raise _plugin_error(f"plugin {entry.name} ({entry.value})", error) from error


def import_plugin(module: str) -> None:
    """Import a module, or a file such as ./my_method.py, that registers components.

    Modules are also looked for in the working directory, and modules that a file imports next to it.

    Raises:
        UserError: it cannot be imported.
    """
    folder = str(Path(module).resolve().parent if module.endswith(".py") else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        if module.endswith(".py"):
            _import_file(Path(module))
            _IMPORTED[Path(module).stem] = str(Path(module).resolve())
        else:
            import_module(module)
            _IMPORTED[module] = module
    except Exception as error:
        raise _plugin_error(f"--import {module}", error) from error


def imports_of(config: Any) -> list[str]:
    """Return what `import_plugin` must get before `config` can be read: the modules and files of its components."""
    words = [word for value in vars(config).values() if is_dataclass(value) for word in imports_of(value)]
    return sorted({*words, *imports_of_module(type(config).__module__)})


def imports_of_module(module: str) -> list[str]:
    """Return what `import_plugin` got from which a module comes; nothing for a module of this package."""
    return [word for name, word in _IMPORTED.items() if f"{module}.".startswith(f"{name}.")]


def import_options() -> list[str]:
    """Return the options with which another process imports the plugins that this one has imported."""
    return [f"--import={word}" for word in sorted(set(_IMPORTED.values()))]


def take_imports(words: Sequence[str]) -> list[str]:
    """Import what `--import MODULE` in the words of a command line names, and return the other words.

    Raises:
        UserError: a module cannot be imported.
    """
    others, remaining = [], list(words)
    while remaining:
        word = remaining.pop(0)
        name, equals, value = word.partition("=")
        if name != "--import":
            others.append(word)
            continue
        if not equals and not remaining:
            raise SharedError("--import: a value is missing. Give a module or a Python file.")
        import_plugin(value if equals else remaining.pop(0))
    return others


def _import_file(path: Path) -> None:
    name, path = path.stem, path.resolve()
    loaded = sys.modules.get(name)
    if loaded is not None:
        if getattr(loaded, "__file__", None) == str(path):
            return
        raise ImportError(f"there is already a module called {name}. Rename the file.")
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise


def _plugin_error(plugin: str, error: Exception) -> SharedError:
    frames = []
    traceback = error.__traceback__
    while traceback:
        frames.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    own = [(file, line) for file, line in frames if not file.startswith("<") and file != __file__]
    own = [(file, line) for file, line in own if "importlib" not in file]
    where = f" at {own[0][0]}:{own[0][1]}" if own else ""
    return SharedError(f"{plugin}: cannot be imported{where} ({type(error).__name__}: {error})")
