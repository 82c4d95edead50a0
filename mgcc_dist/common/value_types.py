"""Types of configuration values, and their names in help and errors: "positive integer", "one of half, all"."""

import math
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

if TYPE_CHECKING:  # plain numbers to a type checker; at run time jsonargparse rejects values out of range
    NonNegativeFloat = float
    NonNegativeInt = int
    PositiveFloat = float
    PositiveInt = int
    UnitInterval = float
else:
    from jsonargparse.typing import ClosedUnitInterval as UnitInterval
    from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

# What an annotation says is the type's name in help and errors.
Folder = Annotated[str, "folder"]
File = Annotated[str, "file"]
FileOrFolder = Annotated[str, "file or folder"]
FileOrName = Annotated[str, "file or name"]
FolderOrName = Annotated[str, "folder or name"]
Name = Annotated[str, "name"]
FolderPath = Annotated[Path, "folder"]
RunOrModel = Annotated[Path, "run or model"]
FilePath = Annotated[Path, "file"]

_NAMES = {  # one of them, several of them
    PositiveInt: ("positive integer", "positive integers"),
    NonNegativeInt: ("integer from 0", "integers from 0"),
    PositiveFloat: ("positive number", "positive numbers"),
    NonNegativeFloat: ("number from 0", "numbers from 0"),
    UnitInterval: ("number from 0 to 1", "numbers from 0 to 1"),
    int: ("integer", "integers"),
    float: ("number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    Path: ("path", "paths"),
}


@cache
def parse_value(kind: Any, word: str) -> Any:
    """Read a value of type `kind` from a word that a person typed, or from JSON.

    Raises:
        ValueError: the word is not such a value.
    """
    if word == "none" and accepts_none(kind) and "none" not in choices(kind):
        return None
    try:
        return _builtin(_parser(kind).parse_args([f"--value={word}"]).value)
    except (ArgumentError, TypeError) as error:
        raise ValueError(word) from error


@cache
def _parser(kind: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.add_argument("--value", type=kind)
    return parser


def _builtin(value: Any) -> Any:
    """Convert jsonargparse's restricted numbers to plain ones, which YAML and checkpoints (weights_only) accept."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_builtin, value))
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{value} is not a finite number")
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def describe(kind: Any, several: bool = False) -> str:
    """Name a type as a person would: "positive integer or none"."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return arguments[1] + ("s" if several else "")
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, UnionType):
        named = [describe(each, several) for each in arguments if each is not NoneType]
        if accepts_none(kind) and choices(kind):
            return f"{named[0]}, none"
        return " or ".join([*named, "none"] if accepts_none(kind) else named)
    if origin is tuple:
        return f"list of {describe(arguments[0], several=True)}"
    return _NAMES[kind][several]


def describe_one(kind: Any) -> str:
    """The same with its article: "a positive integer or none"."""
    name = describe(kind)
    if name.startswith(("one of", "true or", "text")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def accepts_none(kind: Any) -> bool:
    """Return whether None is a value of a type."""
    return get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind)


def choices(kind: Any) -> tuple[str, ...]:
    """The values of a Literal, also of one in a union or tuple; empty for other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) is Annotated:
        return ()
    return tuple(value for each in get_args(kind) for value in choices(each))
