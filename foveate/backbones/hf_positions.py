"""Change the image size of Hugging Face models: resize positions once, as transformers does.

transformers resizes positions in every forward pass: bicubically, on a square grid. The families
differ only in antialiasing.
"""

from __future__ import annotations

from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import nn

from foveate.backbones.hf_folder import HF_FAMILIES

__all__ = ["resize_positions"]

_ANTIALIASED = ("dinov2_with_registers",)  # all others are resized without antialiasing


def resize_positions(
    model: nn.Module, grid: tuple[int, int], antialias: bool | None = None
) -> bool:
    """Change the image size of a Hugging Face model in place: its embeddings and configuration.

    Return whether positions were antialiased.

    Args:
        model: a model of one of ``HF_FAMILIES``.
        grid: new patch rows and columns.
        antialias: None does what transformers does in the model's forward pass.
    """
    backbone = next(family for family in HF_FAMILIES if family.accepts(model))(model)
    spec, tower = backbone.spec, backbone.tower
    old: Any = tower.embeddings
    size = [n * side for n, side in zip(grid, spec.patch, strict=True)]
    if spec.grid[0] != spec.grid[1]:
        raise ValueError(
            f"this {type(model).__name__} has positions for {spec.grid[0]} x {spec.grid[1]} "
            "patches, and transformers resizes square grids only; leave image_size out"
        )
    # CLIP and SigLIP store only one side. DINOv2 would resize a grid that is not square again.
    square = backbone.always_resizes or isinstance(getattr(old, "image_size", None), int)
    if square and grid[0] != grid[1]:
        raise ValueError(
            f"a {type(model).__name__} can be made for square images only, got image_size "
            f"{size[0]} x {size[1]}; leave image_size out: foveate.apply runs it on such images"
        )
    if antialias is None:
        antialias = tower.config.model_type in _ANTIALIASED
    state = dict(old.state_dict())
    key = next(key for key in state if key.startswith("position_embedding"))
    shape = state[key].shape  # [1, P, C] or [P, C]
    positions = resample_abs_pos_embed(
        state[key].view(1, -1, shape[-1]),
        new_size=list(grid),
        old_size=list(spec.grid),
        num_prefix_tokens=shape[-2] - spec.grid[0] * spec.grid[1],
        antialias=antialias,
    )
    state[key] = positions.view(*shape[:-2], -1, shape[-1])
    tower.config.image_size = size[0] if size[0] == size[1] else size
    masked = backbone._arguments().get("use_mask_token")
    new = type(old)(tower.config, **({"use_mask_token": True} if masked else {}))
    new.load_state_dict(state, assign=True)
    tower.embeddings = new.train(old.training)
    return antialias
