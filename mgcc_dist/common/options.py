"""Options of a config dataclass: one per field, those of nested dataclasses with dotted keys (`loop.epochs`).

The docstring under a field is its help text; under a nested dataclass it is the heading of that section. A section
whose type is the base class of a registry (components.py) has the options of the chosen component.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

from docstring_parser import parse_from_object

from mgcc_dist.common.components import Registry, registry_of
from mgcc_dist.common.value_types import describe, describe_one

_ARGUMENT = "argument"
_NEUTRAL = "neutral"
_INPUT = "data_input"
_ALTERNATIVE = "alternative"
_RECORDED = "recorded"


@dataclass(frozen=True)
class Option:
    key: str
    """dotted: "loop.epochs" """
    kind: Any
    """its type; annotations name it in help"""
    plain_kind: Any
    """the same without annotations"""
    default: Any
    """dataclasses.MISSING if a value is required"""
    text: str
    """one line of help"""
    argument: Mapping[str, Any]
    """keywords of `argument`"""
    alternative: str = ""
    """key that is null while this one has a value; "" if there is none"""
    recorded: bool = False
    """whether programs set it, and not people"""

    @property
    def section(self) -> str:
        """ "loop" for loop.epochs, "" at the top level."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        """As a person types it: `--loop.epochs`, `--skip-bad`, `sweep`."""
        if self.positional:
            return self.key
        return f"--{self.key if self.section else self.key.replace('_', '-')}"

    @property
    def names(self) -> str:
        """All names that a person may type: `--run or --model`."""
        return f"{self.name} or --{self.alias}" if self.alias else self.name

    @property
    def positional(self) -> bool:
        return bool(self.argument.get("positional"))

    @property
    def alias(self) -> str | None:
        """A second name that may be given instead of its own."""
        return self.argument.get("alias")

    @property
    def has_name(self) -> bool:
        """Whether it may be given as `--key`; a positional one only if it says so."""
        return not self.positional or bool(self.argument.get("named"))

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def is_flag(self) -> bool:
        return self.argument.get("action") == "store_true"

    @property
    def takes_several(self) -> bool:
        """Whether it is given as several words, not as one list."""
        return self.argument.get("nargs") in ("+", "*") or self.repeatable

    @property
    def repeatable(self) -> bool:
        """Whether each time that it is given adds a value."""
        return self.argument.get("action") == "append"

    @property
    def type_name(self) -> str:
        return describe(get_args(self.kind)[0], several=True) if self.takes_several else describe(self.kind)

    @property
    def expected(self) -> str:
        """What to give, with an article: "a positive integer", "files"."""
        return self.type_name if self.takes_several else describe_one(self.kind)


def argument(default: Any = dataclasses.MISSING, **keywords: Any) -> Any:
    """A dataclass field that is not given as `--name VALUE`.

    Args:
        default: no default makes the option required.
        keywords: as for `ArgumentParser.add_argument`: `nargs`, `const`, `action="append"`; or `positional=True`, with
            `named=True` if `--name VALUE` is understood too; or `alias="other"`, so that `--other` is the same option.
    """
    return dataclasses.field(default=default, metadata={_ARGUMENT: keywords})


def flag() -> Any:
    """A dataclass field that is False unless `--name` is given."""
    return argument(False, action="store_true")


def neutral(default: Any) -> Any:
    """A dataclass field that does not affect the result of a run, so a run may be resumed with another value."""
    return dataclasses.field(default=default, metadata={_NEUTRAL: True})


def recorded(default: Any) -> Any:
    """A dataclass field that programs set in the files that they write. Help does not list it."""
    return dataclasses.field(default=default, metadata={_NEUTRAL: True, _RECORDED: True})


def data_input(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that names input data, one or several: the same content under another path is the same run."""
    return dataclasses.field(default=default, metadata={_INPUT: True})


def alternative_to(other: str) -> Any:
    """A dataclass field that is null by default. A value for it replaces one that an earlier layer gives to `other`."""
    return dataclasses.field(default=None, metadata={_ALTERNATIVE: other})


def is_neutral(field: "dataclasses.Field[Any]") -> bool:
    """Return whether a field was made by `neutral`."""
    return bool(field.metadata.get(_NEUTRAL))


def is_data_input(field: "dataclasses.Field[Any]") -> bool:
    """Return whether a field was made by `data_input`."""
    return bool(field.metadata.get(_INPUT))


@dataclass(frozen=True)
class ConfigField:
    """A field of a config dataclass, with its type."""

    name: str
    kind: Any
    plain_kind: Any
    """the same without annotations"""
    default: Any
    text: str
    argument: Mapping[str, Any]
    alternative: str
    recorded: bool

    @property
    def is_section(self) -> bool:
        return isinstance(self.plain_kind, type) and dataclasses.is_dataclass(self.plain_kind)


@cache
def fields_of(config_class: type) -> tuple[ConfigField, ...]:
    """Return the fields of a config dataclass with their types and docstrings, those of its bases first."""
    kinds, plain_kinds = get_type_hints(config_class, include_extras=True), get_type_hints(config_class)
    texts = _field_texts(config_class)
    return tuple(
        ConfigField(
            field.name,
            kinds[field.name],
            plain_kinds[field.name],
            field.default,
            texts.get(field.name, ""),
            field.metadata.get(_ARGUMENT, {}),
            field.metadata.get(_ALTERNATIVE, ""),
            field.metadata.get(_RECORDED, False),
        )
        for field in dataclasses.fields(config_class)
    )


def options_of(config_class: type, chosen: Mapping[str, type] | None = None, prefix: str = "") -> Iterator[Option]:
    """All options, in the order of the fields, those of the top level first.

    `chosen` holds the config class of the component of each section that has one; the default component otherwise.
    """
    yield from (_option(field, prefix) for field in fields_of(config_class) if not field.is_section)
    for field in fields_of(config_class):
        if field.is_section:
            section, kind = prefix + field.name, _chosen(field, prefix, chosen)
            for option in options_of(kind, chosen, f"{section}."):
                registry = registry_of(field.plain_kind) if option.key == f"{section}.name" else None
                if registry:
                    names: Any = Literal[tuple(registry.names())]
                    option = dataclasses.replace(option, kind=names, plain_kind=names)
                yield option


def headings_of(config_class: type, chosen: Mapping[str, type] | None = None, prefix: str = "") -> dict[str, str]:
    """The heading of each section: {"loop": "training", ...}; its key where the field has no docstring."""
    headings = {}
    for field in fields_of(config_class):
        if field.is_section:
            section = prefix + field.name
            headings[section] = field.text or section.replace(".", " ")
            headings |= headings_of(_chosen(field, prefix, chosen), chosen, f"{section}.")
    return headings


def component_sections(config_class: type, prefix: str = "") -> dict[str, Registry[Any]]:
    """The outermost sections whose keys depend on the chosen component, by key."""
    sections: dict[str, Registry[Any]] = {}
    for field in fields_of(config_class):
        if registry := registry_of(field.plain_kind):
            sections[prefix + field.name] = registry
        elif field.is_section:
            sections |= component_sections(field.plain_kind, f"{prefix}{field.name}.")
    return sections


def _chosen(field: ConfigField, prefix: str, chosen: Mapping[str, type] | None) -> type:
    """The config class of a section."""
    registry = registry_of(field.plain_kind)
    if not registry:
        return field.plain_kind
    return (chosen or {}).get(prefix + field.name) or registry.default().config


def _option(field: ConfigField, prefix: str) -> Option:
    key = prefix + field.name
    alternative = prefix + field.alternative if field.alternative else ""
    return Option(
        key, field.kind, field.plain_kind, field.default, field.text, field.argument, alternative, field.recorded
    )


def _field_texts(config_class: type) -> dict[str, str]:
    classes = [each for each in reversed(config_class.__mro__) if dataclasses.is_dataclass(each)]
    parsed = [field for each in classes for field in parse_from_object(each).params]
    return {each.arg_name: " ".join((each.description or "").split()) for each in parsed if each.description}
