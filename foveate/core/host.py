"""The interface that other libraries expect of a model, on a model that runs with few tokens.

A ReducedViT takes attributes that it does not have itself from the model inside. Methods with a
name from timm behave as in timm. Calls that would ignore the reduction method are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.core.schedule import check_choice

if TYPE_CHECKING:
    from foveate.core.backbone import Backbone
    from foveate.core.tokens import TokenState

__all__ = ["HostedModel", "on_grid"]

_REFUSED = {
    "prune_intermediate_layers": "call it on the model before foveate.apply",
    "save_pretrained": "use foveate.save(model, folder)",
    "push_to_hub": "use foveate.push_to_hub(model, 'OWNER/NAME')",
}


class HostedModel(nn.Module):
    """Forwards attributes to the model inside and gives features as timm's models do."""

    backbone: Backbone
    begin: Callable[..., TokenState]
    step: Callable[..., TokenState]
    end: Callable[..., TokenState]
    tokens: Callable[..., TokenState]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "vit" not in self.__dict__.get("_modules", {}):
                raise
        if name in _REFUSED:
            raise AttributeError(f"{name} would ignore the method: {_REFUSED[name]}")
        try:
            return getattr(self.vit, name)
        except AttributeError:
            raise AttributeError(
                f"neither {type(self).__name__} nor the {type(self.vit).__name__} inside has an "
                f"attribute {name!r}"
            ) from None

    # Features, as timm gives them ----------------------------------------------------------------

    def forward_features(self, images: Tensor, keep_mask: Tensor | None = None) -> Tensor:
        """Return final, normed features ``[B, prefix + H*W, C]``, whatever the method did.

        Prefix tokens come first, then every patch in its place. A merged patch has the value of its
        merged token, and a patch that is gone has its last value. ``tokens`` returns the tokens
        themselves.
        """
        return on_grid(self.tokens(images, keep_mask))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        *,
        keep_mask: Tensor | None = None,
        gone: str = "last",
    ) -> Any:
        """Return features after some blocks, restored to the grid, in timm's forms.

        Args:
            x: preprocessed images.
            indices: the last n blocks if a number, those blocks if a list, all if None. They come
                in the order of the blocks.
            return_prefix_tokens: pair each feature with its prefix tokens.
            norm: apply the final norm.
            stop_early: stop after the last block in ``indices``.
            output_fmt: "NCHW" for ``[B, C, H, W]`` or "NLC" for ``[B, H*W, C]``.
            intermediates_only: leave out the final features, which otherwise come first.
            output_dict: return a dictionary.
            keep_mask: as in ``begin``.
            gone: value of a patch whose token is gone, as in ``TokenState.restore``.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        backbone, depth = self.backbone, self.backbone.spec.depth
        wanted = _block_numbers(indices, depth)
        maps: list[Tensor] = []
        fronts: list[Tensor] = []
        state = self.begin(x, keep_mask, track=True)
        for block in range(max(wanted) + 1 if stop_early else depth):
            state = self.step(block, state)
            if block not in wanted:
                continue
            seen = state.recalled()
            grid, front = seen.restore(gone), seen.prefix_tokens()
            grid, front = (backbone.norm(grid), backbone.norm(front)) if norm else (grid, front)
            if output_fmt == "NCHW":
                grid = grid.transpose(1, 2).unflatten(2, state.grid).contiguous()
            maps.append(grid)
            fronts.append(front)
        final = None
        if not intermediates_only:
            if state.block == depth:
                final = on_grid(self.end(state), gone)
            else:
                final = backbone.norm(on_grid(state, gone))
        paired = return_prefix_tokens and backbone.spec.prefix > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": maps}
            found |= {"image_intermediates_prefix": fronts} if paired else {}
            return found if final is None else {**found, "image_features": final}
        features: Any = list(zip(maps, fronts, strict=True)) if paired else maps
        return features if final is None else (final, features)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Return features after some blocks, as timm's and DINO's models do."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens,
            norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    # Parameters, as timm's optimisers ask for them -----------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that the model inside exempts from weight decay."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by layer as the model inside does.

        No rule matches the method's own parameters, so timm puts them in the last layer, the head.
        """
        groups = dict(self.vit.group_matcher(coarse=coarse))
        for key, rules in groups.items():
            if isinstance(rules, str):
                groups[key] = _inside(rules)
            else:
                groups[key] = [(_inside(rule), *rest) for rule, *rest in rules]
        return groups


def _inside(pattern: str) -> str:
    """Make a pattern for the model's names match them behind the prefix ``vit.``."""
    bare = re.sub(r"(^|[|])[\^]", r"\1", pattern)
    return rf"^vit\.(?:{bare})"


def on_grid(state: TokenState, gone: str = "last") -> Tensor:
    """Return prefix tokens and every patch in its place, ``[B, prefix + H*W, C]``."""
    state = state.recalled()
    return torch.cat([state.prefix_tokens(), state.restore(gone)], 1)


def _block_numbers(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise ValueError(f"indices must be 1..{depth} blocks, got {indices}")
        return list(range(depth - indices, depth))
    wanted = [i + depth if i < 0 else i for i in indices]
    for given, i in zip(indices, wanted, strict=True):
        if not 0 <= i < depth:
            raise ValueError(f"indices must lie in {-depth}..{depth - 1}, got {given}")
    if not wanted:
        raise ValueError("indices must name at least one block")
    return wanted
