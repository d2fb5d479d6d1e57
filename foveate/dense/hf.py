"""Backbones in the form that dense models of Hugging Face transformers take (UperNet, DPT, ...).

Such a model reads ``feature_maps`` and ``channels`` from its ``backbone``. ``as_backbone`` gives
that form to a dense backbone or a driven ViT, and ``reduce_backbone`` applies a method to the
DINOv2 inside a model and keeps its weights.

    from foveate.dense.hf import reduce_backbone

    model = DPTForDepthEstimation.from_pretrained(...)   # on DINOv2
    reduce_backbone(model, "tome(r=0.05)")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput

from foveate import api
from foveate.core import Outcome, ReducedViT, Reducer, TokenState
from foveate.dense.backbone import DenseBackbone, drive

__all__ = ["TransformersBackbone", "as_backbone", "reduce_backbone"]

# Backbones that can be driven, and the models that have the same parts under the same names.
_TOWERS = {
    "Dinov2Backbone": "Dinov2Model",
    "Dinov2WithRegistersBackbone": "Dinov2WithRegistersModel",
}


class TransformersBackbone(nn.Module):
    """Returns the maps of a dense backbone or of some blocks of a ViT; see ``as_backbone``.

    Attributes:
        inside: the dense backbone, or the driven ViT.
        channels: number of channels of each map, from which heads are built.
    """

    def __init__(self, inside: DenseBackbone | ReducedViT, indices: Sequence[int]) -> None:
        super().__init__()
        self.inside, self.indices = inside, tuple(indices)
        self.norm, self.reshape = True, True
        if isinstance(inside, DenseBackbone):
            self.channels = [inside.out_channels] * len(inside.scales)
        else:
            self.channels = [inside.backbone.spec.width] * len(self.indices)
        self._outcome: Outcome | None = None

    @property
    def reducer(self) -> Reducer:
        """The method."""
        return self.inside.reducer

    def forward(self, pixel_values: Tensor, **options: Any) -> BackboneOutput:
        """Return ``feature_maps``, and never attentions or hidden states, even on request."""
        if isinstance(self.inside, DenseBackbone):
            maps = self._of_dense(pixel_values)
        else:
            maps = self._of_blocks(pixel_values)
        form: Any = BackboneOutput  # declared with a single map
        return form(feature_maps=tuple(maps))

    def forward_with_filtered_kwargs(self, *args: Any, **options: Any) -> BackboneOutput:
        """Do the same as ``forward``; transformers calls it by this name."""
        return self(*args, **options)

    def method_losses(self) -> dict[str, Tensor]:
        """Return the method's own weighted losses of the last training pass, to be added."""
        if self._outcome is None:
            raise ValueError("the method's losses need a pass in training mode first")
        return self.reducer.weighted_losses(self._outcome)

    def _of_dense(self, images: Tensor) -> list[Tensor]:
        assert isinstance(self.inside, DenseBackbone)
        side = self.inside.size_divisible
        if any(length % side for length in images.shape[-2:]):
            raise ValueError(
                f"sides of images must be multiples of {side} pixels, got "
                f"{images.shape[-2]} x {images.shape[-1]}: the maps of padded images would not "
                "line up with the images"
            )
        maps, outcome = self.inside.run(images)
        self._outcome = outcome if self.training else None
        return list(maps.values())

    def _of_blocks(self, images: Tensor) -> list[Tensor]:
        vit: Any = self.inside
        norm, found = vit.backbone.norm, list[Tensor]()

        def visit(state: TokenState) -> None:
            if state.block - 1 not in self.indices:
                return
            seen = state.recalled()
            grid, front = seen.restore("last"), seen.prefix_tokens()
            if self.norm:
                grid, front = norm(grid), norm(front)
            if self.reshape:
                found.append(grid.mT.unflatten(2, state.grid).contiguous())
            else:
                found.append(torch.cat([front, grid], 1))

        state = vit.tokens(images, visit=visit)
        self._outcome = Outcome(state.x.new_zeros(state.batch, 0), state) if self.training else None
        return found


def as_backbone(
    model: nn.Module,
    indices: Sequence[int] | None = None,
    *,
    norm: bool = True,
    reshape: bool = True,
) -> TransformersBackbone:
    """Wrap a dense backbone, or a ViT with or without a method, as a backbone of transformers.

    Build the head for its ``channels`` and assign the result to ``head_model.backbone``.

    Args:
        model: a model from ``adapter`` or ``pyramid``, or a ViT, plain or from ``foveate.apply``.
        indices: blocks of a ViT whose tokens become maps; None takes four, evenly spaced.
        norm: whether the final norm of a ViT is applied to these tokens.
        reshape: whether a ViT returns maps ``[B, C, H, W]``; if not, it returns tokens, prefix
            tokens first, as DPT takes them.
    """
    if isinstance(model, DenseBackbone):
        if indices is not None:
            raise ValueError("indices are blocks of a ViT: leave them out for a dense backbone")
        return TransformersBackbone(model, ())
    vit = drive(model)
    depth = vit.backbone.spec.depth
    if indices is None:
        indices = [depth * part // 4 - 1 for part in range(1, 5)]
    if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1]:
        raise ValueError(f"indices must be blocks in ascending order, got {list(indices)}")
    if indices[-1] >= depth:
        raise ValueError(f"indices must lie in 0..{depth - 1}, got {indices[-1]}")
    found = TransformersBackbone(vit, indices)
    found.norm, found.reshape = norm, reshape
    return found.train(model.training)


def reduce_backbone(model: nn.Module, method: str | Reducer, **options: Any) -> nn.Module:
    """Put a method on the DINOv2 inside a dense model of transformers, in place; return the model.

    Weights, stages, norm and form of the maps stay as they were.

    Args:
        model: a model with a ``Dinov2Backbone``, with or without registers, as ``backbone``.
        method: a method as ``foveate.apply`` takes it.
        options: options of the method.
    """
    inside: Any = getattr(model, "backbone", None)
    name = type(inside).__name__
    if name not in _TOWERS:
        raise ValueError(
            f"{type(model).__name__} has {name} as its backbone, but methods run on "
            f"{' and '.join(_TOWERS)}; as_backbone makes a backbone from a ViT"
        )
    stages = [inside.stage_names.index(stage) - 1 for stage in inside.out_features]
    if min(stages) < 0:
        raise ValueError(
            "the backbone returns the embedding before its first block (stem) as a map: leave the "
            "stem out of out_features"
        )
    with torch.device("meta"):
        tower = getattr(transformers, _TOWERS[name])(inside.config)
    for part in ("embeddings", "encoder", "layernorm"):
        setattr(tower, part, getattr(inside, part))
    config = inside.config
    reduced = api.apply(tower.train(inside.training), method, **options)
    model.backbone = as_backbone(
        reduced, stages, norm=config.apply_layernorm, reshape=config.reshape_hidden_states
    )
    return model
