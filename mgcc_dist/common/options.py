"""Options of a config dataclass: one per field, those of nested dataclasses with dotted keys (`loop.epochs`).

The docstring under a field is its help text; under a nested dataclass it is the heading of that section.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from docstring_parser import parse_from_object

from mgcc_dist.common.value_types import describe, describe_one

_METADATA = "argument"
_NEUTRAL = "neutral"
_INPUT = "data_input"


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
    """keywords of `add_argument`; {"positional": True} for what has no name on the command line"""

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
    def positional(self) -> bool:
        return bool(self.argument.get("positional"))

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
        kind = next(iter(get_args(self.kind)), None) if self.takes_several else None
        return describe(kind, several=True) if kind else describe(self.kind)

    @property
    def expected(self) -> str:
        """What to give, with an article: "a positive integer", "files"."""
        return self.type_name if self.takes_several else describe_one(self.kind)


def argument(default: Any = dataclasses.MISSING, **keywords: Any) -> Any:
    """A dataclass field that argparse should read in another way than `--name VALUE`.

    Args:
        default: no default makes the option required.
        keywords: of `ArgumentParser.add_argument` (`nargs`, `action`, `const`), or `positional=True`.
    """
    return dataclasses.field(default=default, metadata={_METADATA: keywords})


def flag() -> Any:
    """A dataclass field that is False unless `--name` is given."""
    return argument(False, action="store_true")


def neutral(default: Any) -> Any:
    """A dataclass field that does not affect the result of a run, so a run may be resumed with another value."""
    return dataclasses.field(default=default, metadata={_NEUTRAL: True})


def data_input(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that names input data, one or several: the same content under another path is the same run."""
    return dataclasses.field(default=default, metadata={_INPUT: True})


def is_neutral(field: "dataclasses.Field[Any]") -> bool:
    return bool(field.metadata.get(_NEUTRAL))


def is_data_input(field: "dataclasses.Field[Any]") -> bool:
    return bool(field.metadata.get(_INPUT))


def options_of(config_class: type, prefix: str = "") -> Iterator[Option]:
    """All options, in the order of the fields, those of the top level first."""
    kinds, plain_kinds = get_type_hints(config_class, include_extras=True), get_type_hints(config_class)
    texts = _field_texts(config_class)
    nested = []
    for field in dataclasses.fields(config_class):
        kind = plain_kinds[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            nested.append((kind, f"{prefix}{field.name}."))
            continue
        yield Option(
            prefix + field.name,
            kinds[field.name],
            kind,
            field.default,
            texts.get(field.name, ""),
            field.metadata.get(_METADATA, {}),
        )
    for kind, longer in nested:
        yield from options_of(kind, longer)


def headings_of(config_class: type, prefix: str = "") -> dict[str, str]:
    """The heading of each section: {"loop": "training", ...}; its key where the field has no docstring."""
    texts, headings = _field_texts(config_class), {}
    for name, kind in get_type_hints(config_class).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            headings[prefix + name] = texts.get(name) or (prefix + name).replace(".", " ")
            headings |= headings_of(kind, f"{prefix}{name}.")
    return headings


def _field_texts(config_class: type) -> dict[str, str]:
    classes = [each for each in reversed(config_class.__mro__) if dataclasses.is_dataclass(each)]
    parsed = [field for each in classes for field in parse_from_object(each).params]
    return {each.arg_name: " ".join((each.description or "").split()) for each in parsed}
