"""Check the options of methods against the types that their fields declare."""

from __future__ import annotations

import types
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["check_type", "check_types"]

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
# Type hints by class: reading them takes longer than everything else that makes a method.
_HINTS: dict[type, dict[str, Any]] = {}


def check_types(config: Any) -> None:
    """Refuse field values of a dataclass that are not of the declared type; lists become tuples.

    Options may come from strings and JSON, where nothing has checked them yet.
    """
    hints = _hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, (list, range)):
            value = tuple(value)
            setattr(config, f.name, value)
        check_type(f.name, value, hints[f.name])


def check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse the value of an option that is not of a type."""
    if not _fits(value, hint):
        raise ValueError(f"{name} must be {_words(hint)}, got {value!r}")


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls)
    return _HINTS[cls]


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(v, parts[0]) for v in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    return True  # a method that declares other kinds of options checks them itself


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        parts = get_args(hint)
        whole_too = [part for part in parts if not (part is int and float in parts)]
        return " or ".join(_words(part) for part in whole_too)
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        several = f"several, each {_words(parts[0])}"
        return several if parts[-1] is Ellipsis else f"{len(parts)} values, each {_words(parts[0])}"
    return "None" if hint is type(None) else _WORDS.get(hint, str(hint))
