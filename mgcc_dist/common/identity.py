"""The identity of a run: the keys that affect its result and differ from their defaults, and the content of its data.

Folder names of sweeps, the check when a run is resumed, groups of runs in reports and the search for a sweep's runs use
it. Whether a key affects the result, or names data, is said by its field (`neutral`, `data_input` in options.py). A key
is compared with the default of the dataclass that holds it, so a new field with a default changes no identity.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mgcc_dist.common.config import as_plain, flatten
from mgcc_dist.common.options import is_data_input, is_neutral

Field = dataclasses.Field[Any]


def identity(config: Any, inputs: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the dotted keys and values that identify a run of `config`, a dataclass.

    Args:
        inputs: content hashes by value of a data input (a path or the name of a split); they replace the values.
    """
    keys = {}
    for key, each, value, default in _fields(config):
        if not is_neutral(each) and value != default:
            keys[key] = _plain(value, inputs or {} if is_data_input(each) else {})
    return keys


def digest(identity: Mapping[str, Any]) -> str:
    """Return eight hex digits of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def input_keys(config: Any) -> set[str]:
    """Return the keys of `config` that name data."""
    return {key for key, each, _, _ in _fields(config) if is_data_input(each)}


def input_values(config: Any) -> set[str]:
    """Return the paths and names of all data that `config` uses."""
    used = set[str]()
    for _, each, value, _ in _fields(config):
        if is_data_input(each) and value is not None:
            used.update([str(value)] if isinstance(value, (str, Path)) else map(str, value))
    return used


def differing_keys(
    then: Any, now: Any, inputs_then: Mapping[str, str] | None = None, inputs_now: Mapping[str, str] | None = None
) -> list[tuple[str, Any, Any]]:
    """Return the keys in which two configs identify different runs, with their values; names of components first.

    Data is the same if its path is, or if both contents are known and equal.
    """
    by_path = _differing(identity(then), identity(now))
    by_content = _differing(identity(then, inputs_then), identity(now, inputs_now))
    values_then, values_now = flatten(as_plain(then)), flatten(as_plain(now))
    keys = sorted(by_path & by_content, key=lambda key: (not key.endswith(".name"), key))
    return [(key, values_then.get(key), values_now.get(key)) for key in keys]


def describe_difference(differing: Collection[tuple[str, Any, Any]]) -> tuple[str, Any, Any, str]:
    """Return the first of `differing` for a message, and how many more there are, in words."""
    key, then, now = next(iter(differing))
    count = len(differing) - 1
    return key, then, now, f" (and {count} more key{'s' * (count > 1)})" if count else ""


def _fields(config: Any, prefix: str = "", base: Any = None) -> Iterator[tuple[str, Field, Any, Any]]:
    """Yield all fields that hold no dataclass, with dotted keys, values and defaults.

    The default of a component's name is that of `base`, the default of the field that holds the component.
    """
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{each.name}.", _default(each))
        else:
            is_component_name = prefix and each.name == "name"
            yield prefix + each.name, each, value, getattr(base, "name", None) if is_component_name else _default(each)


def _default(each: Field) -> Any:
    return each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default


def _plain(value: Any, inputs: Mapping[str, str]) -> Any:
    """Convert a value to what JSON holds; 300.0 and 300 are the same number."""
    if isinstance(value, (list, tuple)):
        return [_plain(item, inputs) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, inputs) for key, item in value.items()}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return inputs.get(str(value), str(value)) if isinstance(value, (str, Path)) else value


def _differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    missing = object()
    return {key for key in then.keys() | now.keys() if then.get(key, missing) != now.get(key, missing)}
