"""Cropr: learned queries pick patches after almost every block; the last block sees all of them.

Paper: Bergner, Lippert and Mahendran, "Token Cropr: Faster ViTs for Quite a Few Tasks", CVPR 2025.

Scored: each token by its dot product with a learned query, on the raw output of a block. The r
patches with the lowest scores leave. They come back before the last block with the values that
they left with (the paper's last layer fusion, here ``recall_before``).

Training: required. After each scored block the queries attend to all tokens, and an auxiliary head
classifies what they gather. Its loss trains the queries and nothing else: they see detached tokens,
and scores do not multiply tokens. Deployed, a module is the sum of its queries.

In a segmenter each place of the grid has a query of its own, which predicts the class of that
place, as in the released code for segmentation. In a detector the classes are those of the objects
and background. That is our choice, because the released code has no detector. A map of labels is
read at the middle of each patch, and queries are resized to other grids. Both are our choices too;
the release has one image size.

Here all prefix tokens are protected, not the class token alone. Patches come back in the order of
the grid, not in that of their scores, which attention does not notice. A model without classes has
no auxiliary heads, so its queries stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.core import (
    BackboneSpec,
    Outcome,
    Reducer,
    Selection,
    TokenState,
    check_blocks,
    check_choice,
    check_removed,
    split_evenly,
)
from foveate.registry import register

__all__ = ["Cropr"]

_AUX = "cropr.aux_logits"


class Scorer(nn.Module):
    """Queries that score tokens and, in training, classify what they attend to.

    Attributes:
        places: rows and columns of the grid that has a query for each place, or None where all
            queries predict the class of the whole image.
    """

    def __init__(
        self, spec: BackboneSpec, options: Cropr, classes: int, places: tuple[int, int] | None
    ) -> None:
        super().__init__()
        width, self.heads, self.places = spec.width, options.heads, places

        def projection() -> nn.Module:
            return nn.Linear(width, width, bias=False) if options.proj else nn.Identity()

        count = options.queries if places is None else places[0] * places[1]
        self.queries = nn.Parameter(torch.empty(count, width))
        self.norm = nn.LayerNorm(width, eps=1e-6) if options.norm else nn.Identity()
        self.query, self.key = projection(), projection()
        if classes:
            hidden = int(width * options.mlp_ratio)
            self.value = projection()
            self.out = nn.Linear(width, width) if self.heads > 1 else nn.Identity()
            self.mlp = nn.Sequential(
                nn.LayerNorm(width, eps=1e-6),
                *(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)),
            )
            self.head = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes))
        else:  # nothing could train the queries
            self.requires_grad_(False)
        std = width**-0.5
        nn.init.trunc_normal_(self.queries, std=std, a=-2 * std, b=2 * std)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Score tokens ``x [T, C]``, higher = keep: ``[T]`` float32."""
        # Scores are summed over queries and heads before any softmax, so one vector gives them. A
        # key projection of the queries instead of the tokens gives the same products.
        q = self.key(self.query(self.queries.sum(0, keepdim=True)))  # [1, C]
        return (self.norm(x) @ q.t()).squeeze(1).float()

    def logits(self, state: TokenState) -> Tensor:
        """Classify what the queries gather from all tokens.

        Return ``[B, classes]``, the mean over queries, or ``[B, classes, H, W]`` for all places.
        """
        x = state.layout.rect(self.norm(state.x.detach()))  # [B, N, C]
        queries: Tensor = self.queries
        if self.places is not None:
            queries = _resized(queries, self.places, state.context.grid)
        # ``key`` projects queries, so its weight is the transpose of one that projects tokens.
        keys = x @ self.key.weight if isinstance(self.key, nn.Linear) else x
        q, k, v = (
            values.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for values in (self.query(queries).expand(len(x), -1, -1), keys, self.value(x))
        )
        present = state.layout.valid(x.device)
        mask = None if present is None else present[:, None, None]
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, M, d]
        z = self.out(z.transpose(1, 2).flatten(2))
        found = self.head(z + self.mlp(z))
        if self.places is None:
            return found.mean(1)
        return found.transpose(1, 2).unflatten(2, state.context.grid)


def _resized(queries: Tensor, grid: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize the queries of all places of a grid to another grid."""
    if grid == new:
        return queries
    map_ = queries.t().unflatten(1, grid)[None]
    map_ = F.interpolate(map_, new, mode="bicubic", align_corners=False)
    return map_[0].flatten(1).t()


@register("cropr")
@dataclass(eq=False, kw_only=True, repr=False)
class Cropr(Reducer):
    """Cross-attention pruning modules between blocks, and last layer fusion.

    Attributes:
        r: patches that each module removes, or one number for each module in turn. The paper's 8
            is for 24 blocks. A number below 1 is a share of the patches that an image begins with,
            for images of any size.
        extra_first: number of patches that the first module removes in addition to a single r. The
            paper's 1 makes counts round if there is a class token.
        blocks: numbers of the blocks after which a module acts, counted from 0. None means every
            block before patches come back, except the one just before that; if they never come
            back, every block but the last.
        queries: learned queries of each module; the logits of several are averaged.
        norm: apply a LayerNorm to the tokens that a module sees.
        proj: project queries, keys and values.
        heads: heads of the cross-attention, which matter to the auxiliary loss alone.
        mlp_ratio: hidden width of the auxiliary head's MLP as a multiple of the model's.
        recall_before: block before which dropped patches come back: "last" is the last block,
            "head" means after it, and None means never.
    """

    r: int | float | tuple[int | float, ...] = 8
    extra_first: int = 1
    blocks: tuple[int, ...] | None = None
    queries: int = 1
    norm: bool = False
    proj: bool = False
    heads: int = 1
    mlp_ratio: float = 4.0
    recall_before: int | str | None = "last"

    paper: ClassVar[str] = "Bergner et al., Token Cropr, CVPR 2025"
    summary: ClassVar[str] = "learned queries drop patches between blocks; the last block gets all"
    hooks: ClassVar[tuple[str, ...]] = ("after",)
    training_need: ClassVar[str] = "required"
    drops: ClassVar[bool] = True
    rate: ClassVar[str] = "r"
    identity: ClassVar[Mapping[str, Any] | None] = {"r": 0, "extra_first": 0}
    default_loss_weights: ClassVar[Mapping[str, float]] = {"aux": 1.0}

    def validate(self) -> None:
        """Refuse counts below zero and modules that cannot be made."""
        if self.blocks is not None:
            check_blocks(self.blocks)
        check_removed(self.r)
        for name, least in (("extra_first", 0), ("queries", 1), ("heads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be above 0, got {self.mlp_ratio}")
        if isinstance(self.recall_before, str):
            check_choice("recall_before", self.recall_before, ("last", "head"))

    def build(self, spec: BackboneSpec) -> None:
        """Make one module for each block that the method acts after."""
        if self.recall_before == "last":
            self.spec = spec  # the base class checks block numbers only
        else:
            super().build(spec)
        if spec.width % self.heads:
            raise ValueError(f"heads must divide the width {spec.width}, got {self.heads}")
        blocks = self.blocks
        if blocks is None:
            blocks = tuple(range(min(self.recall_blocks, default=spec.depth) - 1))
            if not blocks:
                raise ValueError(
                    f"recall_before={self.recall_before!r} leaves no block of {spec.depth} to act "
                    "after: name some with blocks=[...]"
                )
        self.active_blocks = check_blocks(blocks, spec.depth)
        self.removed = self._removed(spec.grid[0] * spec.grid[1])
        self._make_scorers(spec.classes, None)

    def for_pixels(self, classes: int) -> None:
        """Give each place of the grid a query that predicts its class."""
        assert self.spec is not None
        if self.pixel_classes != classes:  # else the present weights stay
            self._make_scorers(classes, self.spec.grid)
            self.pixel_classes = classes

    def _make_scorers(self, classes: int, places: tuple[int, int] | None) -> None:
        assert self.spec is not None
        like = next(self.parameters(), torch.empty(0))
        made = [Scorer(self.spec, self, classes, places) for _ in self.active_blocks]
        self.scorers = nn.ModuleList(made).to(like)
        self.loss_weights = dict(self.default_loss_weights) if classes else {}

    def _removed(self, patches: int) -> dict[int, int | float]:
        """Return how many patches leave after each block; some must be left."""
        r, modules = self.r, len(self.active_blocks)
        if isinstance(r, float):
            r = (r,) * modules
        elif not isinstance(r, Sequence):
            r = (r + self.extra_first, *(r,) * (modules - 1))
        if len(r) != modules:
            raise ValueError(f"r has {len(r)} numbers for {modules} modules")
        shares = sum(one for one in r if isinstance(one, float))
        if shares >= 1:
            raise ValueError(
                f"r={self.r!r} removes {shares:g} of the patches in {modules} modules, and some "
                f"must be left: r must be below {1 / modules:.3g} on average"
            )
        if sum(one for one in r if isinstance(one, int)) >= patches * (1 - shares):
            raise ValueError(
                f"r={self.r!r} removes {sum(r)} of {patches} patches in {modules} modules, and one "
                f"must be left: r may be {(patches - 1) // modules} on average; a share such as "
                "r=0.05 works for any size"
            )
        return dict(zip(self.active_blocks, r, strict=True))

    @property
    def recall_blocks(self) -> frozenset[int]:
        """Blocks before which all patches come back; "last" is the last block."""
        where = self.recall_before
        if where is None or self.spec is None:
            return frozenset()
        if isinstance(where, str):
            where = self.spec.depth - (where == "last")
        return frozenset({where})

    def after(self, block: int, state: TokenState) -> TokenState:
        """Score what leaves the block and drop the patches with the lowest scores."""
        if block not in self.removed:
            return state
        scorer = self.scorers[self.active_blocks.index(block)]
        assert isinstance(scorer, Scorer)
        if state.context.training and hasattr(scorer, "head"):
            state = state.note(_AUX, (*state.notes.get(_AUX, ()), scorer.logits(state)))
        if self.removed[block] == 0:
            return state
        gone = state.to_remove(self.removed[block], lambda n: max(n - 1, 0))
        k: int | list[int]
        if isinstance(gone, int):
            k = state.layout.longest - state.prefix - gone
        else:
            k = [n - one for n, one in zip(state.counts, gone, strict=True)]
        score = state.after_prefix(scorer(state.x.detach()), float("-inf"))
        return state.keep(Selection.best(score, k))

    def losses(
        self, outcome: Outcome, targets: Tensor | None = None, teacher: Outcome | None = None
    ) -> dict[str, Tensor]:
        """Add "aux", the cross entropies of all auxiliary heads, summed."""
        found = super().losses(outcome, targets, teacher)
        if targets is not None and _AUX in outcome.notes:
            each = [F.cross_entropy(logits.float(), targets) for logits in outcome.notes[_AUX]]
            found["aux"] = torch.stack(each).sum()
        return found

    def at_level(self, level: float) -> dict[str, Any]:
        """Return r for each module; the first ones remove one more if the total does not divide."""
        assert self.spec is not None
        goal = round(level * (self.spec.grid[0] * self.spec.grid[1] - 1))
        return {"r": split_evenly(goal, len(self.active_blocks))}

    def at_counts(self, left: Sequence[int]) -> dict[str, Any] | None:
        """Return r for each module: the patches that should have left by then and have not."""
        assert self.spec is not None
        wanted = [self.spec.grid[0] * self.spec.grid[1], *(left[b] for b in self.active_blocks)]
        pairs = zip(wanted[:-1], wanted[1:], strict=True)
        return {"r": tuple(before - after for before, after in pairs)}
