"""Recognise the code base that wrote a checkpoint by its keys, and rename them to timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.backbones import TimmBeit
from foveate.convert.read import EXPECTED, PATCH_KEY, Checkpoint, shorten
from foveate.registry import suggest

__all__ = ["FAMILY", "ORIGINS", "Origin", "find_origin", "translate"]


@dataclass(frozen=True)
class Origin:
    """A code base that releases checkpoints.

    Attributes:
        name: the value of ``origin=``.
        title: the name in messages.
        marks: a pattern; a key that it finds identifies the origin.
        renames: patterns in keys and their replacements, all applied in this order. Keys that
            begin with "reducer." afterwards belong to the method.
        joins: tensors of a block that are concatenated, and the key of the result; None is zeros
            like the first.
        splits: tensors that are cut in halves, the dimension, and the keys of the halves.
        unused: patterns of keys that are left out, and the reason.
        method: the method that such a model runs with.
        options: options of the method for which the release differs from the paper.
        modules: the method's module list with one entry for each stage.
        geometry: arguments of the model that tensors do not show.
        form: kind of model that has these tensors, "vit" or "beit".
        expand: whether a position bias that blocks share is copied to each of them.
        same_keys: names of the origins whose keys are the same.
    """

    name: str
    title: str
    marks: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    joins: tuple[tuple[tuple[str | None, ...], str], ...] = ()
    splits: tuple[tuple[str, int, tuple[str, ...]], ...] = ()
    unused: tuple[tuple[str, str], ...] = ()
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    modules: str | None = None
    geometry: Mapping[str, Any] = field(default_factory=dict)
    form: str = "vit"
    expand: bool = False
    same_keys: tuple[str, ...] = ()


FAMILY = "foveate.family"  # in the metadata of files that save_plain wrote
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
        geometry={"block_eps": 1e-5},  # the default of torch's encoder layers, its blocks
    ),
    Origin(
        name="evovit",
        title="Evo-ViT (DeiT)",
        marks=r"^qks\.\d+\.qk\.",
        renames=(
            (r"^norm\.", "fc_norm."),  # its norm follows the average over patches
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
        same_keys=("vit",),
    ),
    Origin(
        name="bootmae",
        title="BootMAE, encoder only",
        marks=r"^decode_blocks(_1)?\.",
        # Its attention keys have no bias, so zeros stand for one.
        joins=((("attn.q_bias", None, "attn.v_bias"), "attn.qkv.bias"),),
        unused=(
            (
                r"^(decode_|down|lm_head|de_pos_embed|mask_token_1)",
                "the two regressors, used in pre-training only",
            ),
        ),
        same_keys=("vit",),
    ),
    Origin(
        name="conmim",
        title="ConMIM encoder",
        marks=r"^projectors\.\d",
        unused=(
            (r"^(projectors|lm_head)\.", "the projector, used in pre-training only"),
            _INDEX,
        ),
        form="beit",
        expand=True,
        same_keys=("beit",),
    ),
    Origin(
        name="simmim",
        title="SimMIM ViT encoder",
        marks=r"^decoder\.0\.(weight|bias)$",
        unused=(
            (r"^decoder\.", "the layer that predicts pixels, used in pre-training only"),
            _INDEX,
        ),
        form="beit",
        expand=True,
        same_keys=("beit",),
    ),
    Origin(
        name="beit",
        title="BEiT (timm)",
        marks=rf"{_PLACES}bias_table$",
        unused=(_INDEX,),
        form="beit",
        same_keys=("vit",),
    ),
    Origin(name="lvvit", title="LV-ViT", marks=r"^patch_embed\.conv1\."),
    Origin(name="vit", title="plain ViT (timm, DeiT, MAE)", marks=r"^blocks\.0\.attn\.qkv\.weight"),
    # EViT adds no parameters, so its keys are those of a plain ViT and only the user can tell.
    Origin(name="evit", title="EViT", method="evit", same_keys=("vit", "lvvit")),
)
ORIGINS: Mapping[str, Origin] = {origin.name: origin for origin in _ALL}

# These apply to checkpoints of any origin.
_RENAMES = {  # by form
    "vit": ((r"\.gamma_([12])$", r".ls\1.gamma"),),  # LayerScale in DeiT-III and CaiT code
    "beit": (),
}
_UNUSED = ((r"^mask_token$", "the mask token, used in pre-training only"),)

# Other models: the first pattern that finds a key names the model in the error.
_FOREIGN = (
    (r"(^|\.)layers\.\d\.blocks\.\d+\.", "a Swin transformer"),
    (
        rf"^(?!{_PLACES[1:]}(bias_table|index)$).*(relative_position|rel_pos_)",
        "a ViT with relative positions that are not BEiT's",
    ),
    (r"(^|\.)(stages|downsample_layers)\.\d+\.", "a ConvNeXt or another staged network"),
    (r"(^|\.)layer[1-4]\.\d+\.conv\d\.", "a ResNet"),
    (r"embeddings\.patch_embedding", "a Hugging Face model, which is loaded from its folder"),
    (r"encoder\.layers\.encoder_layer_\d+\.", "a torchvision ViT"),
    (r"resblocks\.\d+\.", "OpenAI's or open_clip's CLIP"),
    (
        r"(^|\.)attn\.q_proj\.|\.mlp\.fc1_[gx]\.|(^|\.)rope\.",
        "EVA-02, DINOv3 or another rotary ViT",
    ),
    (r"\.mlp\.w(12|3)\.", "a ViT with a gated feed forward, which is loaded as load(path, model)"),
)


def find_origin(checkpoint: Checkpoint, name: str | None) -> Origin:
    """Return the origin that the keys show, or the named one if the keys agree."""
    if name is not None and name not in ORIGINS:
        raise ValueError(suggest("origin", name, ORIGINS))
    path, keys = checkpoint.path, list(checkpoint.tensors)
    for pattern, what in _FOREIGN:
        fitting = [key for key in keys if re.search(pattern, key)]
        if fitting:
            raise ValueError(
                f"{path} looks like {what}: it has keys such as {shorten(fitting, 2)}; {EXPECTED}"
            )
    found = next((o for o in _ALL if o.marks and any(re.search(o.marks, k) for k in keys)), None)
    if found is None or PATCH_KEY not in keys:
        raise ValueError(f"{path} has keys such as {shorten(keys)}; {EXPECTED}")
    if name is None and checkpoint.metadata.get(FAMILY) == TimmBeit.family:
        name = "beit"
    biased = [key for key in keys if key.endswith(".attn.q_bias")]
    wanted = name or found.name
    plain = found.form == ORIGINS[wanted].form == "vit" and wanted != "bootmae"
    if biased and plain:
        raise ValueError(
            f"{path} looks like EVA, or BEiT without relative positions: it has keys such as "
            f"{shorten(biased, 2)}; give origin='beit' if it is BEiT, origin='bootmae' if it is "
            f"BootMAE's encoder, otherwise {EXPECTED}"
        )
    if name is None or name == found.name:
        return found
    given = ORIGINS[name]
    if found.name not in given.same_keys:
        raise ValueError(
            f"{path} has the keys of {found.name!r}, but origin={name!r} was given; expected keys "
            f"of {given.title}"
        )
    return given


def translate(
    checkpoint: Checkpoint, origin: Origin
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename keys, note what is left out, and return the model's and the method's tensors."""
    kept: dict[str, Tensor] = dict(checkpoint.tensors)
    for pattern, why in (*origin.unused, *_UNUSED):
        out = [key for key in kept if re.search(pattern, key)]
        for key in out:
            del kept[key]
        if out:
            checkpoint.notes.append(f"left out {shorten(out)}: {why}")
    state: dict[str, Tensor] = {}
    for key, value in kept.items():
        for pattern, replacement in (*origin.renames, *_RENAMES[origin.form]):
            key = re.sub(pattern, replacement, key)
        state[key] = value
    for parts, whole in origin.joins:
        for key in [key for key in state if key.endswith(f".{parts[0]}")]:
            block = key.removesuffix(str(parts[0]))
            if all(part is None or block + part in state for part in parts):
                zeros = torch.zeros_like(state[key])
                found = [zeros if part is None else state.pop(block + part) for part in parts]
                state[block + whole] = torch.cat(found)
    for whole, dim, parts in origin.splits:
        for key in [key for key in state if key.endswith("." + whole)]:
            halves = state.pop(key).chunk(len(parts), dim)
            state |= {key.removesuffix(whole) + p: h for p, h in zip(parts, halves, strict=True)}
    own = {k.removeprefix("reducer."): v for k, v in state.items() if k.startswith("reducer.")}
    return {k: v for k, v in state.items() if not k.startswith("reducer.")}, own
