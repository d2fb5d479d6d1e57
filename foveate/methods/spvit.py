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
from torch.nn import functional as F

from foveate.core import BackboneSpec, GatedReducer, TokenState, check_choice, linear_cost
from foveate.registry import register

__all__ = ["SPViT", "Selector"]


class Grouped(nn.Module):
    """One linear layer a head, all in one batched product."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(heads, inputs, outputs), std=0.02)
        )
        self.bias = nn.Parameter(torch.zeros(heads, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """From ``[heads, T, inputs]`` to ``[heads, T, outputs]``."""
        return torch.baddbmm(self.bias, x, self.weight)


class HeadPredictors(nn.Module):
    """DynamicViT's predictor on every head's own channels."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        half, quarter = max(1, dim // 2), max(1, dim // 4)
        self.gain = nn.Parameter(torch.ones(heads, 1, dim))
        self.shift = nn.Parameter(torch.zeros(heads, 1, dim))
        self.into = Grouped(heads, dim, dim)
        self.first = Grouped(heads, dim, half)
        self.rest = nn.Sequential(
            nn.GELU(), Grouped(heads, half, quarter), nn.GELU(), Grouped(heads, quarter, 2)
        )

    def forward(self, x: Tensor, state: TokenState) -> Tensor:
        """Un-normalised keep and drop scores ``[H, T, 2]`` of channels ``[T, H, d]``."""
        tokens, heads, dim = x.shape
        half = self.first.weight.shape[-1]
        # The norm's gain and shift go into the next layer's weights, which are small.
        weight = self.gain.transpose(1, 2) * self.into.weight
        bias = torch.baddbmm(self.into.bias, self.shift, self.into.weight)
        x = F.layer_norm(x, (dim,)).transpose(0, 1)
        if len(weight) < heads:  # one predictor shared by all heads
            x = x.reshape(1, heads * tokens, dim)
        u = F.gelu(torch.baddbmm(bias, x, weight)).view(heads, tokens, dim)
        # The mean is the same for all tokens of an image, so its half of the next layer runs
        # once an image instead of once a token.
        mean = state.mean(u[..., half:].transpose(0, 1)).transpose(0, 1)  # [H, B, d - half]
        own = u[..., :half] @ self.first.weight[:, :half]
        common = mean @ self.first.weight[:, half:] + self.first.bias  # [H, B, half]
        z = own + state.layout.spread(common.transpose(0, 1)).transpose(0, 1)
        return self.rest(z.reshape(len(self.gain), -1, half)).view(heads, tokens, 2)


class Selector(nn.Module):
    """Scores of all heads, and how much each head counts for each token."""

    def __init__(self, heads: int, dim: int, shared: bool) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.predictors = HeadPredictors(1 if shared else heads, dim)
        hidden = max(1, heads // 2)
        self.weigh = nn.Sequential(
            nn.Linear(heads, hidden), nn.GELU(), nn.Linear(hidden, heads), nn.Sigmoid()
        )
        for layer in self.weigh:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, state: TokenState) -> tuple[Tensor, Tensor]:
        """Aggregated log-probabilities ``[T, 2]`` and keep probabilities ``[T]``."""
        parts = state.x.view(-1, self.heads, self.dim)
        importance = self.weigh(parts.mean(-1)).float()  # [T, H]
        importance = (importance / importance.sum(1, keepdim=True)).T  # [H, T]
        scores = self.predictors(parts, state).float()
        odds = scores[..., 0] - scores[..., 1]
        # A softmax over two values, as sigmoids: log drop = log keep - log odds.
        log_keep = (importance * F.logsigmoid(odds)).sum(0)
        log_drop = log_keep - (importance * odds).sum(0)
        return torch.stack([log_keep, log_drop], -1), (importance * odds.sigmoid()).sum(0)


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

    def scoring(self, stage: int, tokens: int) -> int:
        """All heads' predictors, the weights of the heads, and the package."""
        assert self.spec is not None
        selector = self.selectors[stage]
        assert isinstance(selector, Selector)
        parts = selector.predictors
        heads, dim, half = selector.heads, selector.dim, parts.first.weight.shape[-1]
        each = parts.into.weight[0].numel() + half * half
        each += sum(part.weight[0].numel() for part in parts.rest if isinstance(part, Grouped))
        return (
            heads * (tokens * each + (dim - half) * half)
            + len(parts.gain) * dim * dim  # the norm's shift goes into a bias
            + tokens * linear_cost(selector.weigh)
            + (tokens - self.spec.prefix) * self.spec.width
        )

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
