"""Typed dataclass configs from presets, YAML files, the command line and plain data.

`parse(SegmentConfig, words, presets=CONFIGS / "segment", default_preset="mgcc_demo")` returns an instance of the
dataclass. The preset is applied first, wherever it stands on the line; then the `--config` files, in order; then
`--section.key value`. `resolve(SegmentConfig, layers)` does the same from plain data. `common/program.py` turns config
dataclasses into programs. `save` writes a config into a run folder, `load` reads it back.

A section that has a component (components.py) takes the keys of the one that the last layer with a `name` for it names.
Keys of other components are refused in that layer and later ones. In earlier layers, such as a preset, they are
dropped.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml

from mgcc_dist.common.components import Component, Registry, import_plugin, imports_of, registry_of
from mgcc_dist.common.errors import SharedError, did_you_mean, reason_of
from mgcc_dist.common.files import write_text
from mgcc_dist.common.migration import current, with_version
from mgcc_dist.common.options import Option, fields_of, options_of
from mgcc_dist.common.value_types import choices, parse_value

CONFIGS = Path(__file__).parents[1] / "configs"
Config = TypeVar("Config")
# Those of libyaml are ten times as fast, for sweeps of a thousand runs.
SAFE_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Loader(SAFE_LOADER):  # type: ignore[valid-type, misc]
    """Refuses duplicate keys in a mapping; YAML's loader silently keeps the last one."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Merging (<<) puts the merged keys next to the mapping's own, so only the first call sees what the file says.
        if not hasattr(node, "flattened"):
            node.flattened = True  # type: ignore[attr-defined]
            names = set()
            for key, _ in node.value:
                if key.value in names and key.value != "<<":
                    message = f"duplicate key {key.value!r}"
                    raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                if isinstance(key, yaml.ScalarNode):
                    names.add(key.value)
        super().flatten_mapping(node)


@dataclass(frozen=True)
class Layer:
    """Keys and values, of which later layers override earlier ones."""

    tree: Mapping[str, Any]
    """nested mappings; names may also be dotted: {"loop.epochs": 3}"""
    source: str = ""
    """where they stand, for errors: a file, or a place in one; empty for the command line"""


@dataclass(frozen=True)
class Setting:
    """A value as it was given, not yet checked."""

    value: Any
    source: str


@dataclass(frozen=True)
class Section:
    """A section with a component, and which one it is."""

    registry: Registry[Any]
    component: Component[Any]
    chosen_by: int
    """index of the last layer that names a component; -1 if none does"""


@dataclass(frozen=True)
class Settings:
    """What layers give for a config class."""

    options: Mapping[str, Option]
    """by key, those of the chosen components"""
    given: Mapping[str, Setting]
    """by key, from the last layer that gives it"""
    sections: Mapping[str, Section]
    """the sections with a component"""

    @property
    def chosen(self) -> dict[str, type]:
        """The config class of each section that has a component."""
        return {key: section.component.config for key, section in self.sections.items()}

    @property
    def missing(self) -> list[Option]:
        """The required options that have no value."""
        return [option for option in self.options.values() if option.required and option.key not in self.given]


def resolve(config_class: type[Config], layers: Sequence[Layer]) -> Config:
    """Build a `config_class` from layers, of which later ones override earlier ones.

    Raises:
        UserError: unknown key, wrong type, impossible or missing value; the message names the source and the key.
    """
    return build(config_class, settings_of(config_class, layers))


def load(config_class: type[Config], path: Path) -> Config:
    """Read a config that `save` wrote.

    Raises:
        UserError: the file does not exist, is not YAML, or holds a key or value that `config_class` does not accept.
    """
    if not path.is_file():
        raise SharedError(f"{path}: not found. Is {path.parent} a run folder?")
    return resolve(config_class, [read_layer(path)])


def save(config: Any, path: Path) -> None:
    """Write a dataclass config as YAML, with the schema version."""
    write_text(path, as_yaml(config))


def as_yaml(config: Any) -> str:
    """Return a dataclass config as `save` writes it.

    Raises:
        UserError: a value is not UTF-8.
    """
    plugins = imports_of(config)
    tree = with_version(({"import": plugins} if plugins else {}) | as_plain(config))
    try:
        return yaml.dump(tree, Dumper=_DUMPER, sort_keys=False)
    except UnicodeEncodeError as error:
        raise SharedError(
            f"{error.object!a}: is not UTF-8, so it can't be saved in config.yaml. Rename it, or use a link to it."
        ) from error


def as_plain(config: Any) -> dict[str, Any]:
    """Convert a dataclass config to what YAML and JSON hold: dicts, lists, strings, numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    keys: dict[str, Any] = {}
    for key, value in tree.items():
        keys |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return keys


def read_layer(path: Path) -> Layer:
    """Read a YAML file of keys, and import the plugins that its key `import` names.

    Files that version 0.1 saved are converted.

    Raises:
        UserError: the file does not exist, is not YAML, or was saved by a later version.
    """
    try:
        tree = current(read_yaml(path.read_text(encoding="utf-8"), str(path)), str(path))
    except FileNotFoundError as error:
        raise SharedError(f"{path}: not found") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SharedError(f"{path}: cannot be read as text ({error})") from error
    modules = tree.pop("import", None) or []
    for module in [modules] if isinstance(modules, str) else modules:
        import_plugin(str(module))
    return Layer(tree, str(path))


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """Parse a YAML mapping.

    Raises:
        UserError: it is something else; the message names `source`.
    """
    try:
        content = yaml.load(text, _Loader) or {}
        json.dumps(content, default=str, skipkeys=True)  # fails if it contains itself, by an alias
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = reason_of(error).replace('in "<unicode string>", line', "in line")
        raise SharedError(f"{source}: not valid YAML ({reason})") from error
    if not isinstance(content, dict):
        raise SharedError(f"{source}: expected a mapping of keys, got {content!r}")
    return content


def settings_of(config_class: type, layers: Sequence[Layer]) -> Settings:
    """Choose the components, then merge the layers.

    Raises:
        UserError: unknown key or component, or a key of another component.
    """
    flat = [flatten(layer.tree) for layer in layers]
    sections = dict(_sections(config_class, layers, flat))
    options = {
        option.key: option
        for option in options_of(config_class, {key: each.component.config for key, each in sections.items()})
    }
    given = {}
    for index, (layer, keys) in enumerate(zip(layers, flat, strict=True)):
        for key, value in keys.items():
            if key in options:
                given[key] = Setting(value, layer.source)
                other = options[key].alternative
                if other in given and other not in keys and value not in (None, "none", "null"):
                    del given[other]
            elif not _is_dropped(key, value, index, options, sections, layer.source):
                _refuse(key, value, options, sections, layer.source)
    return Settings(options, given, sections)


def build(config_class: type[Config], settings: Settings) -> Config:
    """Check the values of `settings` and build the dataclass of them.

    Raises:
        UserError: a required value is missing, or a value has the wrong type or is impossible.
    """
    values = {key: _checked(settings.options[key], setting) for key, setting in settings.given.items()}
    if settings.missing:
        names = ", ".join(f"{option.names} ({option.type_name})" for option in settings.missing)
        raise SharedError(f"{names}: required")
    try:
        return _instance(config_class, values, settings.chosen, "")
    except ValueError as error:
        raise SharedError(" ".join(str(error).split())) from error


def _sections(
    config_class: type, layers: Sequence[Layer], flat: Sequence[dict[str, Any]], prefix: str = ""
) -> Iterator[tuple[str, Section]]:
    """Yield the sections with components by key, outer ones first. A scalar in `flat` for one becomes its name."""
    for field in fields_of(config_class):
        if not field.is_section:
            continue
        kind, key = field.plain_kind, prefix + field.name
        registry = registry_of(kind)
        if registry:
            for keys in flat:
                if isinstance(keys.get(key), str):
                    keys[f"{key}.name"] = keys.pop(key)
            naming = [index for index, keys in enumerate(flat) if f"{key}.name" in keys]
            section = Section(registry, registry.default(), -1)
            if naming:
                name, source = flat[naming[-1]][f"{key}.name"], layers[naming[-1]].source
                section = Section(registry, _find(registry, name, key, source), naming[-1])
            yield key, section
            kind = section.component.config
        yield from _sections(kind, layers, flat, f"{key}.")


def _find(registry: Registry[Any], name: Any, key: str, source: str) -> Component[Any]:
    component = registry.find(name) if isinstance(name, str) else None
    if component is None:
        expected = f"expected one of {', '.join(registry.names())}, got {name!r}"
        hint = did_you_mean(str(name), registry.names()) or " A plugin's needs --import MODULE."
        raise SharedError(f"{_where(source)}{key}.name: {expected}.{hint}")
    return component


def _section_of(key: str, sections: Mapping[str, Section]) -> str:
    """The innermost section with a component that contains `key`; "" if none."""
    return max((each for each in sections if key.startswith(f"{each}.")), key=len, default="")


def _is_dropped(
    key: str, value: Any, index: int, options: Mapping[str, Option], sections: Mapping[str, Section], source: str
) -> bool:
    """Whether a key that is no option is allowed in the layer `index`: an empty section, or another component's key.

    Raises:
        UserError: another component has it, but this layer is not before the one that chooses the component.
    """
    if value is None and any(option.startswith(f"{key}.") for option in options):
        return True
    name = _section_of(key, sections)
    if not name:
        return False
    section = sections[name]
    others = [each for each in section.registry.components() if key in _keys_of(each, name)]
    if others and index >= section.chosen_by:
        own = _names(_keys_of(section.component, name), name)
        kind = f"{section.registry.kind} {section.component.name}"
        raise SharedError(f"{_where(source)}{key}: {kind} has no such key. Its keys: {own}.")
    return bool(others)


def _keys_of(component: Component[Any], section: str) -> list[str]:
    return [option.key for option in options_of(component.config, prefix=f"{section}.")]


def _names(keys: Sequence[str], section: str) -> str:
    return ", ".join(key.removeprefix(f"{section}.") for key in keys)


def _refuse(
    key: str, value: Any, options: Mapping[str, Option], sections: Mapping[str, Section], source: str
) -> NoReturn:
    """Raise UserError for a key that does not exist."""
    if any(option.startswith(f"{key}.") for option in options):
        raise SharedError(f"{_where(source)}{key}: expected a mapping of keys, got {value!r}")
    parts = key.split(".")
    prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    unknown = next(each for each in prefixes if not any(option.startswith(f"{each}.") for option in options))
    section = _section_of(key, sections)
    if section:
        own = _names(_keys_of(sections[section].component, section), section)
        hint = did_you_mean(unknown.removeprefix(f"{section}."), own.split(", "), f"{section}.") or f" Its keys: {own}."
    else:
        hint = did_you_mean(unknown, options)
    raise SharedError(f"{_where(source)}{unknown}: unknown key.{hint}")


def _checked(option: Option, setting: Setting) -> Any:
    """The value of a setting, which has the option's type.

    Raises:
        UserError: it has another one.
    """
    value, kind = setting.value, option.plain_kind
    if value is False and "no" in choices(option.kind):  # YAML reads a plain `no` as false
        value = "no"
    words = value if option.takes_several and isinstance(value, (list, tuple)) else [value]
    try:
        if "" in words and any(name in option.expected for name in ("file", "folder")):  # it would be the current one
            raise ValueError(value)
        if words is value:
            return tuple(parse_value(get_args(kind)[0], _word(word)) for word in words)
        return parse_value(kind, _word(value))
    except ValueError as error:
        suggestion = did_you_mean(str(words[-1]), choices(option.kind)) if words else ""
        got = " ".join(repr(word if isinstance(word, str) else _word(word)) for word in words)
        name = option.key if setting.source or option.section else option.name
        message = f"{_where(setting.source)}{name}: expected {option.expected}, got {got}"
        raise SharedError(f"{message}.{suggestion}" if suggestion else message) from error


def _word(value: Any) -> str:
    """A value as a person would type it."""
    return str(value) if isinstance(value, (str, Path, date)) else json.dumps(value, default=str)


def _where(source: str) -> str:
    return f"{source}: " if source else ""


def _instance(config_class: Any, values: Mapping[str, Any], chosen: Mapping[str, type], prefix: str) -> Any:
    arguments = {}
    for field in fields_of(config_class):
        key = prefix + field.name
        if field.is_section:
            arguments[field.name] = _instance(chosen.get(key, field.plain_kind), values, chosen, f"{key}.")
        elif key in values:
            arguments[field.name] = values[key]
    try:
        return config_class(**arguments)
    except ValueError as error:
        if str(error).split(" ")[0] in arguments:  # it begins with one of its own keys
            raise ValueError(f"{prefix}{error}") from error
        raise
