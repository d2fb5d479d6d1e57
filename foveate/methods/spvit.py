"""SPViT: a multi-head selector drops patches and packs what they held into one token.

Paper: Kong et al., "SPViT: Enabling Faster Vision Transformers via Latency-Aware Soft Token
Pruning", ECCV 2022.

Scored: every patch by one small predictor per head, combined with per-token head weights from a
squeeze-and-excitation branch. The dropped patches of an image become one package token, their
score-weighted mean, which is never dropped. By default each image keeps what its gates say.

Training: required for the selectors; losses as DynamicViT's, the ratio loss on the batch mean.

Deviations: the release sums packages without normalising and shares one module between heads;
``package="sum"`` and ``shared_heads=True`` reproduce that. It also samples its gates in
evaluation; here evaluation is arg-max unless ``gate="sample"``. The rates .617, .369, .137 are
those in the released code; the count of 2.7 GMACs in the paper does not follow from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate.core import BackboneSpec, GatedReducer, TokenState, check_choice
from foveate.registry import register

__all__ = ["SPViT", "Selector"]


class HeadPredictor(nn.Module):
    """DynamicViT's predictor on one head's channels, for ``heads`` weights at once or shared."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half, quarter = max(1, dim // 2), max(1, dim // 4)
        self.split = half
        self.local = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out = nn.Sequential(
            nn.Linear(dim, half),
            nn.GELU(),
            nn.Linear(half, quarter),
            nn.GELU(),
            nn.Linear(quarter, 2),
        )

    def forward(self, x: Tensor, state: TokenState) -> Tensor:
        """Un-normalised keep and drop scores ``[T, 2]`` from one head's channels ``[T, d]``."""
        u = self.local(x)
        local, shared = u[:, : self.split], u[:, self.split :]
        z = torch.cat([local, state.layout.spread(state.mean(shared))], -1)
        return self.out(z)


class Selector(nn.Module):
    """Scores of all heads, and how much each head counts for each token."""

    def __init__(self, heads: int, dim: int, shared: bool) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.predictors = nn.ModuleList(HeadPredictor(dim) for _ in range(1 if shared else heads))
        hidden = max(1, heads // 2)
        self.weigh = nn.Sequential(
            nn.Linear(heads, hidden), nn.GELU(), nn.Linear(hidden, heads), nn.Sigmoid()
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, state: TokenState) -> tuple[Tensor, Tensor]:
        """Aggregated log-probabilities ``[T, 2]`` and keep probabilities ``[T]``."""
        parts = state.x.view(-1, self.heads, self.dim)
        importance = self.weigh(parts.mean(-1)).float()  # [T, H]
        importance = importance / importance.sum(1, keepdim=True)
        scores = torch.stack(
            [
                self.predictors[h % len(self.predictors)](parts[:, h], state).float()
                for h in range(self.heads)
            ],
            1,
        )  # [T, H, 2]
        log_prob = (importance[..., None] * scores.log_softmax(-1)).sum(1)
        prob = (importance[..., None] * scores.softmax(-1)).sum(1)
        return log_prob, prob[:, 0]


@register("spvit")
@dataclass(eq=False, kw_only=True, repr=False)
class SPViT(GatedReducer):
    """Multi-head selectors drop patches; package tokens keep what they held.

    Attributes:
        keep: absolute share of the original patches after each stage.
        package: "mean" is the paper's score-weighted mean; "sum" the release's plain weighted sum.
        accumulate: add later packages to the first one instead of appending another.
        shared_heads: all heads of a selector share one predictor, as in the release.
    """

    keep: float | tuple[float, ...] = (0.617, 0.369, 0.137)
    package: str = "mean"
    accumulate: bool = False
    shared_heads: bool = False

    paper: ClassVar[str] = "Kong et al., SPViT, ECCV 2022"
    summary: ClassVar[str] = "multi-head selectors drop patches and pack them into one token"
    loss_weights: ClassVar[Mapping[str, float]] = {"ratio": 2.0, "kl": 0.5, "token": 0.5}
    needs_place: ClassVar[bool] = True
    rule: ClassVar[str] = "argmax"
    ratio_per_image: ClassVar[bool] = False

    def validate(self) -> None:
        """Check the package's kind."""
        super().validate()
        check_choice("package", self.package, ("mean", "sum"))

    def build(self, spec: BackboneSpec) -> None:
        """Make one selector a stage."""
        super().build(spec)
        dim = spec.width // spec.heads
        self.selectors = nn.ModuleList(
            Selector(spec.heads, dim, self.shared_heads) for _ in self.acts
        )

    @property
    def fixed_count(self) -> bool:
        """Package tokens come only where something was dropped, so images may differ."""
        return False

    def candidates(self, state: TokenState) -> Tensor | None:
        """Packages are never dropped."""
        return state.after_prefix(state.placed(), False)

    def logits(self, stage: int, state: TokenState) -> Tensor:
        """Aggregated log-probabilities; package tokens count in the global mean."""
        log_prob, keep = self.selectors[stage](state)
        # The package weighs by keep probability; pass it on with the logits' third column.
        return state.after_prefix(torch.cat([log_prob, keep[:, None]], -1))

    def leave(
        self, before: TokenState, after: TokenState, dropped: Tensor, logits: Tensor
    ) -> TokenState:
        """Pack what was dropped into one more token, or into the one there is already."""
        weight = logits[..., 2] * dropped
        if self.package == "mean":
            weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-12)
        tokens = before.after_prefix(before.x)
        package = (weight.to(tokens.dtype)[:, None, :] @ tokens).squeeze(1)  # [B, C]
        exists = dropped.detach().sum(1) > 0
        if self.accumulate:
            after, exists = self._add(after, package, exists)
        if after.alive is not None:
            return after.append(package, alive=exists)
        return after.append(package, exists)

    def _add(self, state: TokenState, package: Tensor, exists: Tensor) -> tuple[TokenState, Tensor]:
        """Add to packages that exist; images still without one are left in ``exists``."""
        front = torch.arange(state.layout.longest, device=package.device) < state.prefix
        old = ~state.layout.rect(state.placed(), True) & ~front  # [B, N]
        if state.alive is not None:
            old = old & (state.alive.detach() > 0)
        # One package an image, unless an image has none yet.
        rows = state.layout.flat(old).to(package.dtype)
        x = (
            state.x
            + state.layout.spread(package * exists.to(package.dtype)[:, None]) * rows[:, None]
        )
        return state.replace(x=x), exists & ~old.any(1)

    def planned(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """The scheduled patches and the package tokens so far."""
        if hook != "before" or block not in self.acts:
            return current
        left = patches = grid[0] * grid[1]
        packages = 0
        for stage in range(self.acts.index(block) + 1):
            count = self.schedule.count(stage, patches, left, self.progress)
            if count < left:
                packages = 1 if self.accumulate else packages + 1
            left = count
        return left + packages
