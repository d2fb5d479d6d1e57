"""Infer the size and form of a plain ViT, multi-scale ViT or LV-ViT from its tensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from foveate.backbones import LVViT, MultiScaleViT, Scales, plain_vit
from foveate.convert.read import EXPECTED, PATCH_KEY, Checkpoint
from foveate.facts import image_grid

__all__ = [
    "CLASSES",
    "GRID",
    "HEADS",
    "IMAGES",
    "POOL",
    "SCALES",
    "Geometry",
    "Grid",
    "resize_note",
]

# Metadata of files that save_plain wrote: facts that tensors do not show.
HEADS, GRID, IMAGES = "foveate.num_heads", "foveate.grid", "foveate.images"
POOL, CLASSES, SCALES = "foveate.pool", "foveate.class_names", "foveate.scales"
_HEAD_WIDTH = 64
_STEM = "patch_embed.conv1.weight"  # of LV-ViT
_LOW = "low_pos_embed"  # of multi-scale ViTs
_POOLS = ("avg", "avgmax", "max", "token", "map")
Grid = tuple[int, int]


class Geometry:
    """The size and form of a model, inferred from its tensors; ValueError if these do not fit.

    Args:
        checkpoint: the file that holds the tensors; notes are added to it.
        state: the tensors by their names in timm.
    """

    def __init__(self, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
        self.path, self.metadata = checkpoint.path, checkpoint.metadata
        self.notes, self.state = checkpoint.notes, state

    def model(
        self,
        num_heads: int | None,
        image_size: int | tuple[int, int] | None,
        special: Mapping[str, Any],
    ) -> nn.Module:
        """Make a model with tensors of these shapes, on the meta device.

        Args:
            num_heads: number of heads; None assumes a head width of 64.
            image_size: image size; None takes the size that the stored positions are for.
            special: arguments of ``plain_vit`` that the origin implies.
        """
        hidden, width = self._shape("blocks.0.mlp.fc1.weight", 2)
        if self._shape("blocks.0.mlp.fc2.weight", 2)[1] != hidden:
            raise ValueError(
                f"{self.path} has a gated feed forward, expected a plain one; make the model "
                "yourself and call load(path, model)"
            )
        patch, channels = self._patch()
        wanted = None if image_size is None else image_grid(image_size, patch)
        stored, front = self.positions(wanted)
        grid = wanted or stored
        if grid is None:
            raise ValueError(
                f"{self.path} has no positions that tell its image size; give image_size="
            )
        ratio = hidden / width
        if int(width * ratio) != hidden:  # the model multiplies it by the width and rounds down
            ratio = math.nextafter(ratio, math.inf)
        arguments: dict[str, Any] = {
            "img_size": [n * side for n, side in zip(grid, patch, strict=True)],
            "patch_size": list(patch),
            "in_chans": channels,
            "num_classes": self._shape("head.weight", 2)[0] if "head.weight" in self.state else 0,
            "embed_dim": width,
            "depth": self._depth(),
            "num_heads": self._heads(width, num_heads),
            "mlp_ratio": ratio,
        }
        with torch.device("meta"):
            return self._make(arguments, front, special)

    def _make(self, arguments: dict[str, Any], front: int, special: Mapping[str, Any]) -> nn.Module:
        """Make the model; its first ``front`` positions belong to prefix tokens."""
        if _STEM in self.state:
            return LVViT(**{**arguments, "patch_size": arguments["patch_size"][0]})
        form = {**self._form(front), **special}
        if _LOW not in self.state:
            return plain_vit(**arguments, **form, initialise=False)
        scales = self._scales()
        if form.pop("distilled"):
            raise ValueError(f"{self.path} has two scales and a distillation token; expected one")
        arguments["depth"] += scales.early or 0
        return MultiScaleViT(scales=scales, **arguments, **form)

    def _scales(self) -> Scales:
        """Return the options of a multi-scale ViT, which stand in the file's metadata."""
        found = self._json(SCALES, None)
        if not isinstance(found, dict):
            raise ValueError(
                f"{self.path} has two scales and no metadata {SCALES} that says how they are "
                "joined; make the model yourself and call load(path, model)"
            )
        try:
            return Scales(**found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path} has metadata {SCALES} {found!r}: {error}") from None

    def positions(self, wanted: Grid | None) -> tuple[Grid | None, int]:
        """Return the grid of the stored positions, and how many belong to prefix tokens.

        A square number of positions means a square grid, whatever ``wanted`` says: that may be
        the grid to resize them to. Otherwise ``wanted`` must be the stored grid.
        """
        saved = self._saved_grid()
        if "pos_embed" not in self.state:
            return saved, 0
        count = self._shape("pos_embed", 3)[1]
        tokens = [k for k in ("cls_token", "dist_token", "reg_token") if k in self.state]
        prefix = sum(self._shape(token, 3)[1] for token in tokens)
        # Models with register tokens usually have positions for patches only, others for all
        # tokens. The order matters only for tiny grids, where both readings give a square.
        fronts = (0, prefix) if "reg_token" in self.state else (prefix, 0)
        for known in (saved, "square", wanted):
            for front in fronts:
                side = math.isqrt(max(0, count - front))
                grid = (side, side) if known == "square" else known
                if isinstance(grid, tuple) and grid[0] * grid[1] == count - front > 0:
                    return grid, front
        raise ValueError(
            f"{self.path} has {count} positions and {prefix} prefix tokens, which fit no square "
            "grid; give the image size that they are for as image_size=(height, width)"
        )

    def with_positions(self, grid: Grid, antialias: bool) -> dict[str, Tensor]:
        """Return the tensors with positions for a grid, resized if they were for another grid."""
        stored, front = self.positions(grid)
        if stored is None or stored == grid or "pos_embed" not in self.state:
            return dict(self.state)
        self.notes.append(resize_note(stored, grid, antialias))
        positions = resample_abs_pos_embed(
            self.state["pos_embed"],
            new_size=list(grid),
            old_size=list(stored),
            num_prefix_tokens=front,
            antialias=antialias,
        )
        resized = {**self.state, "pos_embed": positions}
        if _LOW in self.state:
            resized[_LOW] = resample_abs_pos_embed(
                self.state[_LOW],
                new_size=[side // 2 for side in grid],
                old_size=[side // 2 for side in stored],
                num_prefix_tokens=1,
                antialias=antialias,
            )
        return resized

    def _shape(self, key: str, ndim: int) -> tuple[int, ...]:
        if key not in self.state:
            raise ValueError(f"{self.path} has no {key}; {EXPECTED}")
        shape = tuple(self.state[key].shape)
        if len(shape) != ndim or 0 in shape:
            raise ValueError(
                f"{self.path} has {key} of shape {list(shape)}, expected {ndim} dimensions"
            )
        return shape

    def _patch(self) -> tuple[Grid, int]:
        """Return the height and width of a patch, and the channels of images."""
        _, channels, height, width = self._shape(PATCH_KEY, 4)
        if _STEM in self.state:  # this stem halves images before patches are made
            return (2 * height, 2 * width), self._shape(_STEM, 4)[1]
        return (height, width), channels

    def _depth(self) -> int:
        blocks = {int(m[1]) for key in self.state if (m := re.match(r"blocks\.(\d+)\.", key))}
        missing = sorted(set(range(len(blocks))) - blocks)
        if missing:
            raise ValueError(
                f"{self.path} has {len(blocks)} blocks, expected blocks.{missing[0]} among them"
            )
        return len(blocks)

    def _heads(self, width: int, given: int | None) -> int:
        normed = self.state.get("blocks.0.attn.q_norm.weight")
        if given is None and normed is not None and width % normed.numel() == 0:
            return width // normed.numel()
        if given is None and HEADS in self.metadata:
            given = self._numbers(HEADS, 1)[0]
        if given is None and width % _HEAD_WIDTH:
            raise ValueError(
                f"{self.path} has width {width}, which heads of width {_HEAD_WIDTH} do not "
                "divide; give the number of heads as num_heads="
            )
        heads = width // _HEAD_WIDTH if given is None else given
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
            raise ValueError(
                f"num_heads must be a whole number that divides the width {width} of "
                f"{self.path}, got {heads!r}"
            )
        return heads

    def _saved_grid(self) -> Grid | None:
        if GRID not in self.metadata:
            return None
        rows, columns = self._numbers(GRID, 2)
        return rows, columns

    def image_settings(self) -> dict[str, Any]:
        """Return the preprocessing settings in the file's metadata, empty if there are none."""
        found = self._json(IMAGES, {})
        if not isinstance(found, dict):
            raise ValueError(f"{self.path} has metadata {IMAGES} {found!r}, expected a JSON object")
        return found

    def class_names(self) -> list[str] | None:
        """Return the names of classes in the file's metadata, None if there are none."""
        found = self._json(CLASSES, None)
        if found is None:
            return None
        outputs = self._shape("head.weight", 2)[0] if "head.weight" in self.state else 0
        if not isinstance(found, list) or len(found) != outputs:
            given = f"{len(found)} names" if isinstance(found, list) else repr(found)
            raise ValueError(
                f"{self.path} has metadata {CLASSES} of {given}, expected a JSON list of "
                f"{outputs} names, one for each output"
            )
        return [str(name) for name in found]

    def _json(self, key: str, absent: Any) -> Any:
        if key not in self.metadata:
            return absent
        try:
            return json.loads(self.metadata[key])
        except json.JSONDecodeError:
            raise ValueError(
                f"{self.path} has metadata {key} {self.metadata[key]!r}, expected JSON"
            ) from None

    def _pool(self, legal: tuple[str, ...], shown: str) -> str:
        """Return the pooling in the file's metadata, otherwise the one that its tensors show."""
        pool = self.metadata.get(POOL, shown)
        if pool not in legal:
            raise ValueError(
                f"{self.path} has metadata {POOL} {pool!r}, expected one of {', '.join(legal)}"
            )
        return pool

    def _numbers(self, key: str, count: int) -> list[int]:
        text = self.metadata[key]
        parts = text.split("x")
        if len(parts) != count or not all(part.isdecimal() for part in parts):
            expected = "x".join("N" * count)
            raise ValueError(f"{self.path} has metadata {key} {text!r}, expected {expected}")
        return [int(part) for part in parts]

    def _form(self, front: int) -> dict[str, Any]:
        """Return arguments of ``plain_vit`` for the kind of ViT that has these tensors."""
        has = self.state.keys()
        pool = "token" if "cls_token" in has else "avg"
        if "attn_pool.latent" in has:
            pool = "map"
        elif "fc_norm.weight" in has:
            pool = "avg"
        clip = "norm_pre.weight" in has
        if clip:
            self.notes.append(
                "a norm before the blocks, as in CLIP: layer norms get eps 1e-5 and the activation "
                "GELU; for OpenAI's weights, which need QuickGELU, pass the model"
            )
        return {
            "distilled": "dist_token" in has,
            "eps": 1e-5 if clip else 1e-6,
            "global_pool": self._pool(_POOLS, pool),
            "qkv_bias": "blocks.0.attn.qkv.bias" in has,
            "qk_norm": "blocks.0.attn.q_norm.weight" in has,
            "init_values": 1.0 if "blocks.0.ls1.gamma" in has else None,
            "class_token": "cls_token" in has,
            "pos_embed": "learn" if "pos_embed" in has else "none",
            "no_embed_class": "pos_embed" in has and not front,
            "reg_tokens": self._shape("reg_token", 3)[1] if "reg_token" in has else 0,
            "pre_norm": clip,
            "fc_norm": "fc_norm.weight" in has,
        }


def resize_note(old: Grid, new: Grid, antialias: bool) -> str:
    """Write the note that says how positions were resized."""
    return (
        f"positions resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches, "
        f"{'with' if antialias else 'without'} antialiasing"
    )
