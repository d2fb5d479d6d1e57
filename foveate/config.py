"""Settings as data: YAML files over dataclasses, with dotted overrides and clear errors.

jsonargparse checks types. This file does the rest: errors about unknown keys that name the nearest
key and where it was given, one sentence for every error, groups that may also be written as one
word, and recipes that are found by name.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from foveate.core import Reducer
from foveate.registry import parse as parse_method
from foveate.registry import suggest

__all__ = [
    "described",
    "dump",
    "explain",
    "find_recipe",
    "headers",
    "list_recipes",
    "load",
    "parse",
    "read",
]

_T = TypeVar("_T")
_RECIPES = {
    **{"pretrain": "mim.recipe", "pipeline": "stages.recipe"},
    **{"detect": "train.dense_recipe", "segment": "train.dense_recipe"},
}
_NAMED = [["method"], ["backbone"], ["head"]]  # groups of a name and its options
_METHOD = "method"  # the group that may also be written as one word
_TERSE = ("method", "backbone", "head", "data.augment")  # their errors name only the last key


def load(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds keys and values."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} must hold keys and values, got {type(tree).__name__}")
    return dict(tree)


def read(
    cls: type[_T], path: Path, overrides: Sequence[str] = (), *, given: str = "the command line"
) -> _T:
    """Read a dataclass from a YAML file, changed by ``key=value`` overrides with dotted keys."""
    return parse(cls, load(path), overrides, str(path), given=given)


def parse(
    cls: type[_T],
    tree: Any,
    overrides: Sequence[str] = (),
    where: str = "settings",
    *,
    given: str | None = None,
) -> _T:
    """Make a dataclass from nested mappings.

    Args:
        cls: class of the result.
        tree: nested mappings.
        overrides: changes of it, ``key=value``.
        where: place that the tree comes from, for messages.
        given: place that the overrides come from, for messages; None is the same place.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where} must hold keys and values, got {type(tree).__name__}")
    tree, given = _copied(tree), given or where
    _check_keys(cls, tree, "", where)
    # Apply presets first, because they clear their groups.
    for text in sorted(overrides, key=lambda text: not text.partition("=")[0].endswith(".preset")):
        _override(tree, text)
    _check_keys(cls, tree, "", given)
    parser = _parser(cls)  # type: ignore[arg-type]  # to mypy, classes are not hashable
    from jsonargparse import ArgumentError

    try:
        # The classes know their defaults; filled in here, all would be checked each time.
        values = parser.instantiate(parser.parse_object(tree, defaults=False))
        return cls(**values.as_dict())
    except ArgumentError as error:
        said = _sentence(error)
        raise ValueError(f"{_origin(said, overrides, given, where)}: {said}") from None
    except ValueError as error:  # raised by the dataclass itself
        said = _sentence(error)
        raise ValueError(f"{_origin(said, overrides, given, where)}: {said}") from error


def dump(settings: Any) -> str:
    """Write a dataclass as YAML from which ``read`` makes it again."""
    import yaml

    return yaml.safe_dump(_plain(settings), sort_keys=False, default_flow_style=None, width=100)


def meanings(cls: type) -> dict[str, str]:
    """Return what the docstrings of a dataclass and its bases say about each field, on one line."""
    from docstring_parser import parse as parse_docstring

    found: dict[str, str] = {}
    for base in cls.__mro__:
        if dataclasses.is_dataclass(base):
            for param in parse_docstring(base.__doc__ or "").params:
                found.setdefault(param.arg_name, " ".join((param.description or "").split()))
    return found


def explain(cls: type, width: int = 96) -> str:
    """Describe every setting of a dataclass: its type, its default and what it means."""
    lines: list[str] = []

    def group(kind: type, prefix: str) -> None:
        hints, about = get_type_hints(kind), meanings(kind)
        inner: list[tuple[type, str]] = []
        preset = any(field.name == "preset" for field in dataclasses.fields(kind))
        for field in sorted(dataclasses.fields(kind), key=_needed, reverse=True):
            key, said = prefix + field.name, about.get(field.name, "")
            part = _dataclass(hints[field.name])
            if part is not None:
                inner.append((part, key))
                continue
            value = _shown(field)
            head = f"{key} (needed)" if value is None else f"{key}={value}"
            if preset and value == "null":
                head = f"{key} (set by the preset)"
            lines.append(f"  {head}   ({_type_words(hints[field.name])})")
            indent = " " * 6
            lines.extend(
                textwrap.wrap(_typed(said), width, initial_indent=indent, subsequent_indent=indent)
            )
        for part, key in inner:
            lines.append(f"\n{key}: {_first_line(part)}")
            group(part, f"{key}.")

    group(cls, "")
    return "\n".join(lines)


def recipe_class(job: str) -> type:
    """Return the class whose fields are the settings of a job, from the package that has it."""
    room = _RECIPES.get(job, "train.recipe")
    found: type = getattr(import_module(f"foveate.{room}"), job.capitalize())
    return found


def list_recipes(job: str) -> list[str]:
    """Return the names of the recipes that ship for a job."""
    folder = files("foveate").joinpath("recipes", job)
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def find_recipe(job: str, name: str) -> Path:
    """Return the file of a recipe, given as a path or as the name of one that ships."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    if name not in list_recipes(job):
        raise ValueError(suggest(f"recipe for {job}", name, list_recipes(job)))
    return Path(str(files("foveate").joinpath("recipes", job, f"{name}.yaml")))


def headers(job: str) -> dict[str, str]:
    """Return the first comment line of each recipe that ships for a job, by its name."""
    found = {}
    for name in list_recipes(job):
        first = find_recipe(job, name).read_text(encoding="utf-8").split("\n", 1)[0]
        found[name] = first.lstrip("# ")
    return found


@cache  # making a parser takes three times as long as parsing with it
def _parser(cls: type) -> Any:
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise ValueError("recipes need: pip install 'foveate[train]'") from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, as_group=False)
    return parser


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copied(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _override(tree: dict[str, Any], text: str) -> None:
    """Put ``a.b=value`` into nested mappings; the value is read as YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text!r} is not a setting: expected key=value, such as optim.lr=1e-3")
    *path, last = key.split(".")
    for step in path:
        if step == _METHOD and isinstance(tree.get(step), str):
            tree[step] = _method_group(tree[step], key)
        if tree.get(step) is None:
            tree[step] = {}
        tree = tree[step]
        if not isinstance(tree, dict):
            raise ValueError(f"{text!r}: {step} is a single value, not a group of settings")
    # The settings of the group in the file belong to its former preset or name.
    if last == "preset" or (last == "name" and path[-1:] in _NAMED):
        tree.clear()
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{text!r}: the value cannot be read: {reason}") from error


def _method_group(text: str, key: str) -> dict[str, Any]:
    """Turn a method that is written as one word into a group of its name and options."""
    reducer = parse_method(text)
    if len(reducer.members) > 1:
        raise ValueError(f"{key}: {text} is a chain; give its options inside method=... itself")
    changed = {
        field.name: getattr(reducer, field.name)
        for field in dataclasses.fields(reducer)
        if getattr(reducer, field.name) != field.default
    }
    return {"name": reducer.name, **changed}


def _check_keys(cls: type, tree: Mapping[str, Any], prefix: str, where: str) -> None:
    """Refuse unknown keys, naming the nearest one."""
    hints = get_type_hints(cls)
    for key, value in tree.items():
        if key not in hints:
            near = suggest("setting", prefix + str(key), [prefix + name for name in hints])
            raise ValueError(f"{where}: {near}")
        if value is None and type(None) not in get_args(hints[key]) and hints[key] is not Any:
            raise ValueError(f"{where}: {prefix}{key} needs a value, got null")
        inner = _dataclass(hints[key])
        if inner is not None and isinstance(value, Mapping):
            _check_keys(inner, value, f"{prefix}{key}.", where)
        elif inner is not None and value is not None:
            raise ValueError(f"{where}: {prefix}{key} is a group of settings, got {value!r}")


def _origin(said: str, overrides: Sequence[str], given: str, where: str) -> str:
    """Return where the setting that a message is about was given."""
    keys = [text.partition("=")[0] for text in overrides]
    for key in keys:
        words = rf"(?<![\w.]){re.escape(key)}(?!\w)"
        group, _, last = key.rpartition(".")
        if group in _TERSE:
            words += rf"|^{re.escape(last)}\b|'{re.escape(last)}'"
        if key and re.search(words, said):
            return given
    return where


def _dataclass(hint: Any) -> type | None:
    if get_origin(hint) in (Union, types.UnionType):
        found = [part for part in get_args(hint) if _dataclass(part)]
        return found[0] if found else None
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


_EXPECTED = {
    "int": "expected a whole number",
    "float": "expected a number",
    "bool": "expected true or false",
    "str": "expected text",
    "tuple": "expected a list, such as [1, 2]",
}


def _sentence(error: Exception) -> str:
    """Turn jsonargparse's message of several lines into one sentence."""
    text = " ".join(str(error).split())
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    if "Union subtypes" in text:  # may be null too: keep what else is wrong
        text = re.sub(r"Does not validate against any of the Union \S+ Subtypes: .*? - ", "", text)
        text = re.sub(r"Problem with given class_path '\S+': ", "", text)
        text = re.split(" - Expected a NoneType| Given value type", text)[0]
    text = re.sub(
        r"Expected an? (int|float|bool|str|tuple)\b", lambda kind: _EXPECTED[kind[1]], text
    )
    return re.sub(r'Parser key "([^"]+)":', r"\1:", text)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, Reducer):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Path):
        return str(value)
    return described(value)


def described(value: Any) -> str:
    """Describe an object in one line: settings may hold a model or a data set."""
    text = repr(value)
    if "\n" in text or text.startswith("<") or " at 0x" in text or len(text) > 200:
        return f"<{type(value).__name__}>"
    return text


# Words of the help --------------------------------------------------------------------------------


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _shown(field: dataclasses.Field[Any]) -> str | None:
    """Return a default as a user would type it; None if the setting has none."""
    if field.default_factory is not dataclasses.MISSING:
        value: Any = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return None
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


_WORDS = {
    **{bool: "true, false", int: "whole number", float: "number", str: "text"},
    dict: "keys and values",
}


def _type_words(hint: Any) -> str:
    words = list(dict.fromkeys(_each_type(hint)))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _each_type(hint: Any) -> Iterator[str]:
    """Yield what a value may be; null comes last."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for part in sorted(parts, key=lambda part: part is type(None)):
            yield from _each_type(part)
    elif hint is type(None):
        yield "null"
    elif origin is tuple:
        of = _type_words(parts[0])
        each = of if of == "text" else f"{of}s"
        yield f"list of {each}" if parts[1] is ... else f"{len(parts)} {each}"
    else:
        yield from _WORDS.get(origin or hint, "any").split(", ")


def _typed(said: str) -> str:
    """Turn words about Python into a sentence about the command line."""
    text = re.sub(r"\bNone\b", "null", said.replace("``", ""))
    return text[:1].upper() + text[1:]


def _first_line(cls: type) -> str:
    text = (cls.__doc__ or "").strip().split("\n", 1)[0].rstrip(".")
    return text[:1].lower() + text[1:]
