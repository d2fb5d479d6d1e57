"""Methods by name: strict registration, and strings such as ``"evit(keep=0.7)"``."""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from foveate.core import Chain, Reducer

__all__ = ["list_methods", "make", "method_class", "parse", "register", "remake", "suggest"]

_METHODS: dict[str, type[Reducer]] = {}
_R = TypeVar("_R", bound=type[Reducer])


def _methods() -> dict[str, type[Reducer]]:
    """Return the table of methods, with all that ship."""
    # Methods import this file, so it cannot import them at its top. The first call fills the table.
    importlib.import_module("foveate.methods")
    return _METHODS


def register(name: str) -> Callable[[_R], _R]:
    """Register a method class under its name: the paper's, in lower case, letters only."""

    def add(cls: _R) -> _R:
        if not (name.isalnum() and name.islower()):
            raise ValueError(f"method names are lower-case letters and digits, got {name!r}")
        if name in _methods():
            raise ValueError(f"a method named {name!r} is registered already")
        if not cls.paper or not cls.summary or not cls.hooks:
            raise ValueError(f"{cls.__name__} must declare its paper, summary and hooks")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def list_methods() -> list[str]:
    """Return the names of all methods, sorted."""
    return sorted(_methods())


def method_class(name: str) -> type[Reducer]:
    """Return the class of a method; raise ValueError that lists the names if it is unknown."""
    if name not in _methods():
        raise ValueError(suggest("method", name, list_methods()))
    return _methods()[name]


def suggest(kind: str, given: str, legal: Iterable[str]) -> str:
    """Write an error about an unknown name: the nearest name, if any, and all legal names."""
    legal = list(legal)
    by_lower = {name.lower(): name for name in legal}
    near = difflib.get_close_matches(given.lower(), by_lower, n=1)
    hint = f"; did you mean {by_lower[near[0]]!r}?" if near else "."
    return f"unknown {kind} {given!r}{hint} Legal: {', '.join(legal) or 'none'}"


def make(name: str, options: Mapping[str, Any] | None = None) -> Reducer:
    """Build a method from its name and options."""
    cls, options = method_class(name), dict(options or {})
    legal = [f.name for f in fields(cls)]
    for option in options:
        if option not in legal:
            raise ValueError(suggest(f"option of {name}", option, legal))
    return cls(**options)


def remake(reducer: Reducer, options: Mapping[str, Any]) -> Reducer:
    """Build a method again for the same model, with other options and the same weights."""
    spec = reducer.spec
    assert spec is not None
    found = make(reducer.name, {**reducer.config(), **options})
    found.build(spec)
    if reducer.pixel_classes:
        found.for_pixels(reducer.pixel_classes)
    found.load_state_dict(reducer.state_dict())
    return found


def parse(text: str) -> Reducer:
    """Build a method, or a chain of them, from a string; nothing in it is evaluated.

    ``"evit"``, ``"evit(keep=0.7, fuse=False)"``, ``"evit(keep=0.8) + tome(r=4, blocks=[10, 11])"``.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        terms = _terms(tree)
    except SyntaxError as error:
        raise ValueError(f"cannot read the method {_short(text)}: {error.msg}") from error
    except (RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"cannot read the method {_short(text)}: {error}") from None
    parts = [_from_node(node, text) for node in terms]
    return parts[0] if len(parts) == 1 else Chain(*parts)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _terms(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]


def _from_node(node: ast.expr, text: str) -> Reducer:
    if isinstance(node, ast.Name):
        return make(node.id)
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(f"cannot read the method {text!r}: expected NAME or NAME(OPTION=VALUE)")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"cannot read the method {text!r}: options go by name, as OPTION=VALUE")
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg in options:
            raise ValueError(f"cannot read the method {text!r}: {keyword.arg} is given twice")
        try:
            options[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError as error:
            raise ValueError(
                f"cannot read the method {text!r}: the value of {keyword.arg} must be a number, "
                "True, False, None, a list, or text in quotes"
            ) from error
    return make(node.func.id, options)
