"""Whose checkpoint it is, by its keys, and what those are called here: one entry an origin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.backbones import TimmBeit
from foveate.convert.read import ANCHOR, EXPECTED, Checkpoint, few
from foveate.registry import suggest

__all__ = ["FAMILY", "ORIGINS", "Origin", "find", "translate"]


@dataclass(frozen=True)
class Origin:
    """A code base that releases checkpoints.

    Attributes:
        name: what a user calls it.
        title: what people read.
        marks: any key that this pattern finds tells the origin.
        renames: patterns in keys and their replacements, all applied in this order. What begins
            with "reducer." afterwards belongs to the method.
        joins: per block, parts that are one tensor here.
        splits: tensors that are two halves here, and along which dimension.
        unused: patterns of keys that are left out, and why.
        method: the method that such a model runs with.
        options: of the method, where the release differs from the paper.
        modules: the method's list with one entry a stage.
        geometry: what tensors do not show of the model.
        form: kind of model that has these tensors, "vit" or "beit".
        expand: a position bias that blocks share is copied to each of them.
        looks: names of the origins whose keys look the same.
    """

    name: str
    title: str
    marks: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    joins: tuple[tuple[tuple[str, ...], str], ...] = ()
    splits: tuple[tuple[str, int, tuple[str, ...]], ...] = ()
    unused: tuple[tuple[str, str], ...] = ()
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    modules: str | None = None
    geometry: Mapping[str, Any] = field(default_factory=dict)
    form: str = "vit"
    expand: bool = False
    looks: tuple[str, ...] = ()


FAMILY = "foveate.family"  # in the metadata of files that were written here
_PLACES = r"^(blocks\.\d+\.attn|rel_pos_bias)\.relative_position_"
_INDEX = (rf"{_PLACES}index$", "indices of relative positions, which follow from the grid")

_ALL = (
    Origin(
        name="dynamicvit",
        title="DynamicViT",
        marks=r"^score_predictor\.",
        renames=(
            (r"^score_predictor\.(\d+)\.in_conv\.0\.", r"reducer.predictors.\1.norm."),
            (r"^score_predictor\.(\d+)\.out_conv\.2\.", r"reducer.predictors.\1.out.1."),
            (r"^score_predictor\.(\d+)\.out_conv\.4\.", r"reducer.predictors.\1.out.3."),
            (
                r"^score_predictor\.(\d+)\.out_conv\.0\.bias",
                r"reducer.predictors.\1.global_out.bias",
            ),
            (r"^score_predictor\.", "reducer.predictors."),
        ),
        splits=(
            ("in_conv.1.weight", 0, ("local_in.weight", "global_in.weight")),
            ("in_conv.1.bias", 0, ("local_in.bias", "global_in.bias")),
            ("out_conv.0.weight", 1, ("local_out.weight", "global_out.weight")),
        ),
        method="dynamicvit",
        options={"keep": 0.7},
        modules="predictors",
    ),
    Origin(
        name="svit",
        title="SViT classification",
        marks=r"^selective_modules\.|\.TransformerEncoderLayer\.",
        renames=(
            (r"\.TransformerEncoderLayer\.", "."),
            (r"\.self_attn\.in_proj_", ".attn.qkv."),
            (r"\.self_attn\.out_proj\.", ".attn.proj."),
            (r"\.linear([12])\.", r".mlp.fc\1."),
            (r"^selective_modules\.(\d+)\.norm\.", r"reducer.gates.\1.0."),
            (r"^selective_modules\.(\d+)\.mlp\.fc1\.", r"reducer.gates.\1.1."),
            (r"^selective_modules\.(\d+)\.mlp\.fc2\.", r"reducer.gates.\1.3."),
        ),
        method="svit",
        options={"gate_prefix_last": True},
        modules="gates",
        geometry={"block_eps": 1e-5},  # torch's encoder layer, which its blocks are made of
    ),
    Origin(
        name="evovit",
        title="Evo-ViT (DeiT)",
        marks=r"^qks\.\d+\.qk\.",
        renames=(
            (r"^norm\.", "fc_norm."),  # it averages the patches first
            (r"^norms\.(\d+)\.", r"blocks.\1.norm1."),
            (r"^projs\.(\d+)\.", r"blocks.\1.attn.proj."),
            (r"^qks\.(\d+)\.qk\.", r"blocks.\1.attn.qk."),
            (r"^vs\.(\d+)\.v\.", r"blocks.\1.attn.v."),
        ),
        joins=(
            (("attn.qk.weight", "attn.v.weight"), "attn.qkv.weight"),
            (("attn.qk.bias", "attn.v.bias"), "attn.qkv.bias"),
        ),
        unused=(
            (r"^(head|norm)_cls\.", "the classifier on the class token, used in training only"),
            (r"tradeoff", "weights of running scores, which the DeiT models fix (tradeoff=)"),
        ),
        method="evovit",
        options={"variant": "deit"},
    ),
    Origin(
        name="mae",
        title="MAE, encoder only",
        marks=r"^decoder_(embed|blocks|pred|norm|pos_embed)",
        unused=((r"^decoder_", "the decoder, used in pre-training only"),),
        looks=("vit",),
    ),
    Origin(
        name="simmim",
        title="SimMIM ViT encoder",
        marks=r"^decoder\.0\.(weight|bias)$",
        unused=(
            (r"^decoder\.", "the layer that makes pixels, used in pre-training only"),
            _INDEX,
        ),
        form="beit",
        expand=True,
        looks=("beit",),
    ),
    Origin(
        name="beit",
        title="BEiT (timm)",
        marks=rf"{_PLACES}bias_table$",
        unused=(_INDEX,),
        form="beit",
        looks=("vit",),
    ),
    Origin(name="lvvit", title="LV-ViT", marks=r"^patch_embed\.conv1\."),
    Origin(name="vit", title="plain ViT (timm, DeiT, MAE)", marks=r"^blocks\.0\.attn\.qkv\.weight"),
    # Its code adds no parameters, so nothing but the user can tell it from a plain ViT.
    Origin(name="evit", title="EViT", method="evit", looks=("vit", "lvvit")),
)
ORIGINS: Mapping[str, Origin] = {origin.name: origin for origin in _ALL}

# Of any origin.
_RENAMES = {  # by form
    "vit": ((r"\.gamma_([12])$", r".ls\1.gamma"),),  # LayerScale in DeiT-III and CaiT code
    "beit": (),
}
_UNUSED = ((r"^mask_token$", "the mask token, used in pre-training only"),)

# What else people keep in such files; the first pattern that a key fits names it.
_FOREIGN = (
    (r"(^|\.)layers\.\d\.blocks\.\d+\.", "a Swin transformer"),
    (
        rf"^(?!{_PLACES[1:]}(bias_table|index)$).*(relative_position|rel_pos_)",
        "a ViT with relative positions that are not BEiT's",
    ),
    (r"(^|\.)(stages|downsample_layers)\.\d+\.", "a ConvNeXt or another staged network"),
    (r"(^|\.)layer[1-4]\.\d+\.conv\d\.", "a ResNet"),
    (r"embeddings\.patch_embedding", "a Hugging Face model, which loads as its folder"),
    (r"encoder\.layers\.encoder_layer_\d+\.", "a torchvision ViT"),
    (r"resblocks\.\d+\.", "OpenAI's or open_clip's CLIP"),
    (
        r"(^|\.)attn\.q_proj\.|\.mlp\.fc1_[gx]\.|(^|\.)rope\.",
        "EVA-02, DINOv3 or another rotary ViT",
    ),
    (r"\.mlp\.w(12|3)\.", "a ViT with gated feed forward, which needs its model"),
)


def find(checkpoint: Checkpoint, name: str | None) -> Origin:
    """The origin that keys tell, or the named one if keys agree."""
    if name is not None and name not in ORIGINS:
        raise ValueError(suggest("origin", name, ORIGINS))
    path, keys = checkpoint.path, list(checkpoint.tensors)
    for pattern, what in _FOREIGN:
        fitting = [key for key in keys if re.search(pattern, key)]
        if fitting:
            raise ValueError(
                f"{path} looks like {what}: it has keys such as {few(fitting, 2)}; {EXPECTED}"
            )
    found = next((o for o in _ALL if o.marks and any(re.search(o.marks, k) for k in keys)), None)
    if found is None or ANCHOR not in keys:
        raise ValueError(f"{path} has keys such as {few(keys)}; {EXPECTED}")
    if name is None and checkpoint.metadata.get(FAMILY) == TimmBeit.family:
        name = "beit"
    biased = [key for key in keys if key.endswith(".attn.q_bias")]
    if found.form == "vit" and biased and ORIGINS[name or found.name].form == "vit":
        raise ValueError(
            f"{path} looks like EVA, or BEiT without relative positions: it has keys such as "
            f"{few(biased, 2)}; say origin='beit' if it is BEiT, otherwise {EXPECTED}"
        )
    if name is None or name == found.name:
        return found
    given = ORIGINS[name]
    if found.name not in given.looks:
        raise ValueError(
            f"{path} was said to be of origin {name!r} and its keys are those of {found.name!r}; "
            f"expected keys of {given.title}"
        )
    return given


def translate(
    checkpoint: Checkpoint, origin: Origin
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename keys; gives the model's tensors and the method's, and notes what is left out."""
    kept: dict[str, Tensor] = dict(checkpoint.tensors)
    for pattern, why in (*origin.unused, *_UNUSED):
        out = [key for key in kept if re.search(pattern, key)]
        for key in out:
            del kept[key]
        if out:
            checkpoint.notes.append(f"left out {few(out)}: {why}")
    state: dict[str, Tensor] = {}
    for key, value in kept.items():
        for pattern, replacement in (*origin.renames, *_RENAMES[origin.form]):
            key = re.sub(pattern, replacement, key)
        state[key] = value
    for parts, whole in origin.joins:
        for key in [key for key in state if key.endswith("." + parts[0])]:
            block = key.removesuffix(parts[0])
            if all(block + part in state for part in parts):
                state[block + whole] = torch.cat([state.pop(block + part) for part in parts])
    for whole, dim, parts in origin.splits:
        for key in [key for key in state if key.endswith("." + whole)]:
            halves = state.pop(key).chunk(len(parts), dim)
            state |= {key.removesuffix(whole) + p: h for p, h in zip(parts, halves, strict=True)}
    own = {k.removeprefix("reducer."): v for k, v in state.items() if k.startswith("reducer.")}
    return {k: v for k, v in state.items() if not k.startswith("reducer.")}, own
