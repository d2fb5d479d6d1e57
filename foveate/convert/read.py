"""Read a checkpoint file of any kind into tensors by name. Nothing in a file is ever executed."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from foveate.core import check_choice

__all__ = ["ANCHOR", "EXPECTED", "Checkpoint", "few", "read"]

EXPECTED = (
    "expected the weights of a plain ViT, DeiT, BEiT, MAE or SimMIM encoder, LV-ViT, DynamicViT, "
    "EViT, Evo-ViT (DeiT) or SViT classifier"
)
ANCHOR = "patch_embed.proj.weight"  # every model that is read here has this tensor
_FILES = "expected a .pth, .pt or .safetensors file"
_PLAIN = ("model", "state_dict", "model_state_dict", "net", "module")
_EMA = ("model_ema", "ema", "state_dict_ema", "ema_state_dict", "ema_model")
_PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "encoder.")
_ENCODER, _DECODER = "encoder.", "decoder."
_COUNTERS = ("n_averaged",)  # torch's AveragedModel puts it beside the weights


class Inert:
    """Takes the place of plain data that released files hold beside their tensors."""

    def __new__(cls, *args: Any, **options: Any) -> Inert:
        """Take whatever the file says and keep none of it."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# Settings of a run and best scores so far. Not even these classes are called: the file gets an
# inert object in their place. Any other class in a file is refused by name.
_INERT = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar",)),
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    *(f"pathlib.{kind}Path" for kind in ("Posix", "Windows", "PurePosix", "PureWindows")),
    *(f"pathlib._local.{kind}Path" for kind in ("Posix", "Windows", "PurePosix", "PureWindows")),
)


# Settings in the form of a dictionary, as SimMIM has them: such a file gets a dictionary instead.
_TREES = ("yacs.config.CfgNode",)


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        path: the file.
        tensors: float32 where they are floating point, by their names without wrappers' prefixes.
        metadata: of a safetensors file.
        notes: what was understood on the way, for people.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: Mapping[str, str]
    notes: list[str]


def read(path: Path, weights: str = "auto") -> Checkpoint:
    """Read one file: its format by content, its wrappers, its prefixes.

    Args:
        path: the file.
        weights: "model" or "ema" where a file has both; "auto" takes the model's and only where
            there are none the averaged ones.
    """
    check_choice("weights", weights, ("auto", "model", "ema"))
    metadata: Mapping[str, str] = {}
    kind = _kind(path)
    content: Any
    if kind == "safetensors":
        content, metadata = _read_safetensors(path)
    else:
        content = _unpickle(path, mapped=kind == "zip")
    notes: list[str] = []
    tensors = _bare(path, _unwrap(path, content, weights, notes), notes)
    if any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors.values()):
        notes.append("weights of other precision made float32")
    floats = {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
    return Checkpoint(path, floats, metadata, notes)


def few(names: list[str], most: int = 4) -> str:
    """Name some of many, on one line."""
    listed = ", ".join(n if n.isprintable() else repr(n) for n in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


# Formats -----------------------------------------------------------------------------------------


def _kind(path: Path) -> str:
    """Tell the format by the file's first bytes; ValueError for what is no checkpoint."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {_FILES}")
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        raise ValueError(f"{path} is empty; {_FILES}")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a git-LFS pointer and not the file itself, which `git lfs pull` fetches; "
            f"{_FILES}"
        )
    if text.startswith(b"<"):
        raise ValueError(
            f"{path} is an HTML or XML page, as a refused download leaves behind; {_FILES}"
        )
    if head.startswith(b"PK"):
        _check_zip(path)
        return "zip"
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    raise ValueError(f"{path} is no checkpoint, it begins with {head[:12]!r}; {_FILES}")


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # damage shows as any kind of error
        raise ValueError(
            f"{path} is truncated or damaged: its zip directory is not there ({_line(error)}); "
            f"{_FILES}"
        ) from error
    if any(name.split("/")[-1] == "data.pkl" for name in names):
        if any("/code/" in name for name in names):
            raise ValueError(f"{path} is a TorchScript program, not a state dict; {_FILES}")
        return
    what = "a NumPy archive" if any(n.endswith(".npy") for n in names) else "some zip archive"
    raise ValueError(f"{path} is {what} and not one that torch.save wrote; {_FILES}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except Exception as error:  # safetensors raises its own type for every kind of damage
        raise ValueError(
            f"{path} is a truncated or damaged safetensors file ({_line(error)}); expected a whole "
            "one"
        ) from error


def _unpickle(path: Path, mapped: bool) -> Any:
    inert: list[Any] = [(Inert, name) for name in _INERT]
    inert += [(OrderedDict, name) for name in _TREES]
    # torch goes by the name's end here, and maps only what it opens itself.
    mapped = mapped and path.suffix != ".safetensors"
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(inert):
            source = path if mapped else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damage shows as any kind of error
        text = str(error)
        _, found, rest = text.partition("GLOBAL ")
        if found:
            raise ValueError(
                f"{path} may run code when it is unpickled: it holds the global {rest.split()[0]}, "
                "expected tensors and plain data alone; save its state_dict() where it was made"
            ) from error
        raise ValueError(
            f"{path} is truncated, damaged or no PyTorch checkpoint ({_line(error)}); {_FILES}"
        ) from error


def _line(error: Exception) -> str:
    """First line of an error's text, short."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160].rstrip(". ")


# Wrappers ----------------------------------------------------------------------------------------


def _unwrap(path: Path, content: Any, weights: str, notes: list[str]) -> dict[str, Tensor]:
    """Follow wrappers such as ``{"model": ...}`` down to the tensors."""
    trail: list[str] = []
    averaged, top = False, content
    while True:
        if not isinstance(content, Mapping):
            raise ValueError(
                f"{path} holds {_what(content)}{_below(trail)}; expected a dictionary of tensors"
            )
        content = _nested(content)
        inside = {key: value for key, value in content.items() if isinstance(value, Mapping)}
        ema = [key for key in _EMA if inside.get(key)] if not averaged else []
        plain = [key for key in _PLAIN if inside.get(key)]
        order = {"auto": [*plain, *ema], "model": plain, "ema": [*ema, *plain]}[weights]
        if not order:
            break
        averaged = averaged or order[0] in ema
        trail.append(order[0])
        content = inside[order[0]]
        others = [key for key in (*plain, *ema) if key != order[0]]
        notes.append(f"took {order[0]}" + (f" and not {few(others)}" if others else ""))
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if weights == "ema" and not averaged:
        raise ValueError(
            f"{path} holds no EMA copy but {few(list(map(str, top)))}; expected one of "
            f"{', '.join(_EMA)}"
        )
    if not tensors:
        found = few(list(map(str, content)))
        raise ValueError(
            f"{path} holds {found or 'nothing'}{_below(trail)}; expected tensors, or one of "
            f"{', '.join((*_PLAIN, *_EMA))} around them"
        )
    return tensors


def _nested(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Split a flat dictionary that has several wrappers as prefixes, as Lightning writes it."""
    names = [key for key, value in content.items() if isinstance(value, Tensor)]
    groups = {str(key).partition(".")[0] for key in names if key not in _COUNTERS}
    if len(groups) < 2 or not groups <= {*_PLAIN, *_EMA}:
        return content
    split: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    for name in names:
        group, _, rest = str(name).partition(".")
        if rest:
            split[group][rest] = content[name]
    return split


def _bare(path: Path, tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Take prefixes off that all names have."""
    tensors = {name: value for name, value in tensors.items() if name not in _COUNTERS}
    removed = ""
    while tensors:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        removed += prefix
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if removed:
        notes.append(f"prefix {removed!r} taken off all names")
    # SimMIM keeps what makes pixels beside its encoder, which has relative positions always.
    beside = all(name.startswith((_ENCODER, _DECODER)) for name in tensors)
    if beside and _ENCODER + ANCHOR in tensors and any("relative_pos" in name for name in tensors):
        notes.append(f"prefix {_ENCODER!r} taken off the encoder's names")
        tensors = {name.removeprefix(_ENCODER): value for name, value in tensors.items()}
    for prefix in _PREFIXES:
        # With weights of something else beside the model, whose head is it, and what for?
        others = [name for name in tensors if not name.startswith(prefix)]
        if ANCHOR not in tensors and prefix + ANCHOR in tensors:
            raise ValueError(
                f"{path} holds a ViT under {prefix!r} and beside it {few(others)}; expected the "
                "model alone"
            )
    return tensors


def _what(content: Any) -> str:
    return f"{content!r}"[:60] if isinstance(content, (int, float, str)) else type(content).__name__


def _below(trail: list[str]) -> str:
    return f" in {'.'.join(trail)}" if trail else ""
