"""Read a checkpoint file into tensors by name. No code in a file is run."""

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

__all__ = ["PATCH_KEY", "EXPECTED", "Checkpoint", "read", "shorten"]

EXPECTED = (
    "expected the weights of a plain ViT, DeiT, BEiT, encoder of MAE, SimMIM, BootMAE or ConMIM, "
    "LV-ViT, DynamicViT, EViT, Evo-ViT (DeiT) or SViT classifier"
)
PATCH_KEY = "patch_embed.proj.weight"  # every supported model has this tensor
_FILES = "expected a .pth, .pt or .safetensors file"
_PLAIN = ("model", "state_dict", "model_state_dict", "net", "module")
_EMA = ("model_ema", "ema", "state_dict_ema", "ema_state_dict", "ema_model")
_PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "encoder.")
_ENCODER, _DECODER = "encoder.", "decoder."
_COUNTERS = ("n_averaged",)  # torch's AveragedModel stores it beside the weights


class Inert:
    """Stands in for settings and scores that released files hold beside their tensors."""

    def __new__(cls, *args: Any, **options: Any) -> Inert:
        """Accept any arguments and keep none of them."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# Files name these classes for the settings of a run and its best scores. The classes are not
# called: an Inert object replaces each. Any other class in a file is refused by name.
_INERT = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar",)),
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    *(f"pathlib.{kind}Path" for kind in ("Posix", "Windows", "PurePosix", "PureWindows")),
    *(f"pathlib._local.{kind}Path" for kind in ("Posix", "Windows", "PurePosix", "PureWindows")),
)

# SimMIM stores its settings in this kind of dictionary; a plain dictionary replaces it.
_TREES = ("yacs.config.CfgNode",)


@dataclass
class Checkpoint:
    """The contents of a file.

    Attributes:
        path: the file.
        tensors: tensors by name, without prefixes of wrappers; floating-point ones are float32.
        metadata: metadata of a safetensors file.
        notes: sentences for the user about what was recognised.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: Mapping[str, str]
    notes: list[str]


def read(path: Path, weights: str = "auto") -> Checkpoint:
    """Read one file of any supported format and remove wrappers and prefixes.

    Args:
        path: the file.
        weights: "model" or "ema" for files that hold both; "auto" takes the model's weights if
            there are any, otherwise the averaged ones.
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
    tensors = _strip_prefixes(path, _unwrap(path, content, weights, notes), notes)
    if any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors.values()):
        notes.append("weights converted to float32")
    floats = {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
    return Checkpoint(path, floats, metadata, notes)


def shorten(names: list[str], most: int = 4) -> str:
    """List the first names on one line and count the others."""
    listed = ", ".join(n if n.isprintable() else repr(n) for n in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


# Formats -----------------------------------------------------------------------------------------


def _kind(path: Path) -> str:
    """Return the format that the first bytes show; ValueError if the file is not a checkpoint."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; {_FILES}, or the folder of a run or of a saved model"
        )
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        raise ValueError(f"{path} is empty; {_FILES}")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a git-LFS pointer, not the file itself; run `git lfs pull`; {_FILES}"
        )
    if text.startswith(b"<"):
        raise ValueError(
            f"{path} is an HTML or XML page, probably from a failed download; {_FILES}"
        )
    if head.startswith(b"PK"):
        _check_zip(path)
        return "zip"
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    raise ValueError(f"{path} is not a checkpoint: it begins with {head[:12]!r}; {_FILES}")


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # damage shows as any kind of error
        raise ValueError(
            f"{path} is truncated or damaged: it has no zip directory ({_line(error)}); {_FILES}"
        ) from error
    if any(name.split("/")[-1] == "data.pkl" for name in names):
        if any("/code/" in name for name in names):
            raise ValueError(f"{path} is a TorchScript program, not a state dict; {_FILES}")
        return
    what = "a NumPy archive" if any(n.endswith(".npy") for n in names) else "a zip archive"
    raise ValueError(f"{path} is {what} that torch.save did not write; {_FILES}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except Exception as error:  # safetensors raises its own type for every kind of damage
        raise ValueError(
            f"{path} is a truncated or damaged safetensors file ({_line(error)}); expected a "
            "complete one"
        ) from error


def _unpickle(path: Path, mapped: bool) -> Any:
    inert: list[Any] = [(Inert, name) for name in _INERT]
    inert += [(OrderedDict, name) for name in _TREES]
    # torch maps only files that it opens itself, and reads this suffix as safetensors.
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
                "expected tensors and plain data only; save the model's state_dict() instead"
            ) from error
        raise ValueError(
            f"{path} is truncated, damaged or not a PyTorch checkpoint ({_line(error)}); {_FILES}"
        ) from error


def _line(error: Exception) -> str:
    """Return the first line of an error's text, shortened."""
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
                f"{path} holds {_describe(content)}{_inside(trail)}; expected a dictionary of "
                "tensors"
            )
        content = _split_prefixes(content)
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
        notes.append(f"took {order[0]}" + (f" and not {shorten(others)}" if others else ""))
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if weights == "ema" and not averaged:
        raise ValueError(
            f"{path} holds no EMA copy, only {shorten(list(map(str, top)))}; expected one of "
            f"{', '.join(_EMA)}"
        )
    if not tensors:
        found = shorten(list(map(str, content)))
        raise ValueError(
            f"{path} holds {found or 'nothing'}{_inside(trail)}; expected tensors, or one of "
            f"{', '.join((*_PLAIN, *_EMA))} around them"
        )
    return tensors


def _split_prefixes(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Split a flat dictionary by wrappers that are prefixes of its names, as in Lightning files."""
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


def _strip_prefixes(path: Path, tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Remove prefixes that all names share."""
    tensors = {name: value for name, value in tensors.items() if name not in _COUNTERS}
    removed = ""
    while tensors:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        removed += prefix
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if removed:
        notes.append(f"prefix {removed!r} removed from all names")
    # SimMIM stores its pixel layer beside its encoder, which always has relative positions.
    beside = all(name.startswith((_ENCODER, _DECODER)) for name in tensors)
    if (
        beside
        and _ENCODER + PATCH_KEY in tensors
        and any("relative_pos" in name for name in tensors)
    ):
        notes.append(f"prefix {_ENCODER!r} removed from the encoder's names")
        tensors = {name.removeprefix(_ENCODER): value for name, value in tensors.items()}
    for prefix in _PREFIXES:
        # A head beside the model may belong to another task, such as detection.
        others = [name for name in tensors if not name.startswith(prefix)]
        if PATCH_KEY not in tensors and prefix + PATCH_KEY in tensors:
            raise ValueError(
                f"{path} holds a ViT under {prefix!r} and beside it {shorten(others)}; expected "
                "the model only"
            )
    return tensors


def _describe(content: Any) -> str:
    return f"{content!r}"[:60] if isinstance(content, (int, float, str)) else type(content).__name__


def _inside(trail: list[str]) -> str:
    return f" in {'.'.join(trail)}" if trail else ""
