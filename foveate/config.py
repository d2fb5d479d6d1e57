"""Settings as data: YAML files over dataclasses, with dotted overrides and clear errors.

jsonargparse checks types and writes the files; here stands what it does not do: unknown keys that
name the near miss, one sentence for every error, and recipes that are looked up by name.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from foveate.registry import suggest

__all__ = ["dump", "find_recipe", "headers", "list_recipes", "parse", "read"]

_T = TypeVar("_T")


def read(cls: type[_T], path: Path, overrides: Sequence[str] = ()) -> _T:
    """Read a dataclass from a YAML file, changed by ``key=value`` overrides with dotted keys."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    return parse(cls, tree, overrides, str(path))


def parse(cls: type[_T], tree: Any, overrides: Sequence[str] = (), where: str = "settings") -> _T:
    """Make a dataclass from nested mappings; ``where`` is for messages."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where} must hold keys and values, got {type(tree).__name__}")
    tree = _copied(tree)
    # Presets first: they begin their groups anew.
    for text in sorted(overrides, key=lambda text: not text.partition("=")[0].endswith(".preset")):
        _override(tree, text)
    _check_keys(cls, tree, "", where)
    parser = _parser(cls)
    from jsonargparse import ArgumentError

    try:
        values = parser.instantiate(parser.parse_object(tree))
        return cls(**values.as_dict())
    except ArgumentError as error:
        raise ValueError(f"{where}: {_sentence(error)}") from None
    except ValueError as error:  # of the dataclass itself
        raise ValueError(f"{where}: {_sentence(error)}") from error


def dump(settings: Any) -> str:
    """Write a dataclass as YAML that ``read`` gives back."""
    import yaml

    return yaml.safe_dump(_plain(settings), sort_keys=False, default_flow_style=None, width=100)


def list_recipes(job: str) -> list[str]:
    """Names of the recipes that ship for a job."""
    folder = files("foveate").joinpath("recipes", job)
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def find_recipe(job: str, name: str) -> Path:
    """The file of a recipe: a path, or the name of one that ships."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    if name not in list_recipes(job):
        raise ValueError(suggest(f"recipe for {job}", name, list_recipes(job)))
    return Path(str(files("foveate").joinpath("recipes", job, f"{name}.yaml")))


def headers(job: str) -> dict[str, str]:
    """First line of the comment on top of each recipe that ships."""
    found = {}
    for name in list_recipes(job):
        first = find_recipe(job, name).read_text(encoding="utf-8").split("\n", 1)[0]
        found[name] = first.lstrip("# ")
    return found


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
        raise ValueError(f"{text!r} is no setting: expected key=value, such as optim.lr=1e-3")
    *path, last = key.split(".")
    for step in path:
        tree = tree.setdefault(step, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{text!r}: {step} is a single value, not a group of settings")
    if last == "preset":  # a whole group: what the file says of it belongs to another preset
        tree.clear()
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{text!r}: the value cannot be read: {reason}") from error


def _check_keys(cls: type, tree: Mapping[str, Any], prefix: str, where: str) -> None:
    """Refuse keys that are no fields, naming the nearest one."""
    hints = get_type_hints(cls)
    for key, value in tree.items():
        if key not in hints:
            near = suggest("setting", prefix + str(key), [prefix + name for name in hints])
            raise ValueError(f"{where}: {near}")
        if value is None and type(None) not in get_args(hints[key]) and hints[key] is not Any:
            raise ValueError(f"{where}: {prefix}{key} needs a value, and null is none")
        inner = _dataclass(hints[key])
        if inner is not None and isinstance(value, Mapping):
            _check_keys(inner, value, f"{prefix}{key}.", where)
        elif inner is not None and value is not None:
            raise ValueError(f"{where}: {prefix}{key} is a group of settings, got {value!r}")


def _dataclass(hint: Any) -> type | None:
    if get_origin(hint) in (Union, types.UnionType):
        found = [part for part in get_args(hint) if _dataclass(part)]
        return found[0] if found else None
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _sentence(error: Exception) -> str:
    """Shorten jsonargparse's message of several lines."""
    text = " ".join(str(error).split())
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    if "Union subtypes" in text:  # of what may also be null: what is wrong beside that it is not
        text = re.sub(r"Does not validate against any of the Union \S+ Subtypes: .*? - ", "", text)
        text = re.sub(r"Problem with given class_path '\S+': ", "", text)
        text = re.split(" - Expected a NoneType| Given value type", text)[0]
    return re.sub(r'Parser key "([^"]+)":', r"\1:", text)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
