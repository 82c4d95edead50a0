"""Placeholders in sweep files: {split}, {seed} and, in steps, {stage}."""

from typing import Any

from mgcc_dist.common.errors import UserError


def has_placeholder(value: Any) -> bool:
    """Return whether a string, or one in a list of any depth, has braces."""
    if isinstance(value, list):
        return any(map(has_placeholder, value))
    return isinstance(value, str) and ("{" in value or "}" in value)


def is_text(value: Any) -> bool:
    """Return whether a value is a string or a list of strings."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def substitute(source: str, value: Any, **names: Any) -> Any:
    """Replace {split}, {seed} and, in steps, {stage} in all strings of a value."""
    if isinstance(value, dict):
        return {key: substitute(source, item, **names) for key, item in value.items()}
    if isinstance(value, list):
        return [substitute(source, item, **names) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return value.format(**names)
    except (KeyError, IndexError, ValueError) as error:
        *first, last = (f"{{{name}}}" for name in names)
        raise UserError(
            f"{source}: unknown placeholder in {value!r} ({error}). Available: {', '.join(first)} and {last}."
        ) from error
