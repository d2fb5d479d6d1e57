"""DynamicViT: small predictors before three blocks decide which patches go on.

Paper: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
NeurIPS 2021, and its extension in T-PAMI 2023.

Scored: every patch by an MLP on its own features and the mean features of the patches still
alive. The others are dropped for good. Stage s keeps ``floor(N * keep**s)`` of the N original
patches. In training all tokens are computed, gates are sampled, and the attention mask carries
the gradient; deployed, the best-scored patches are gathered.

Training: required for the predictors (30 epochs in the paper), with the ratio loss, a KL term to
the dense model's logits and a mean square error on its kept final tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from foveate.core import BackboneSpec, GatedReducer, TokenState, linear_cost, shift_odds
from foveate.registry import register

__all__ = ["DynamicViT", "Predictor"]


class Predictor(nn.Module):
    """Scores keeping and dropping, from local and global features.

    The paper's layers from C to C and from C to C / 2 channels are split in two: one half for a
    token's own features, one for their mean. The mean is the same for all tokens of an image, so
    its part of the second layer runs once per image instead of once per token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.norm = nn.LayerNorm(width)
        self.local_in, self.global_in = nn.Linear(width, half), nn.Linear(width, half)
        self.local_out = nn.Linear(half, half, bias=False)
        self.global_out = nn.Linear(half, half)
        self.act = nn.GELU()
        self.out = nn.Sequential(
            nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def shift(self, amount: float) -> None:
        """Add a number to the log-odds of keeping."""
        shift_odds(self.out[-1], amount)

    def macs(self, tokens: int) -> int:
        """Count multiply-adds: all layers once per token, except the mean's part of the second."""
        return tokens * linear_cost(self) - (tokens - 1) * linear_cost(self.global_out)

    def forward(self, state: TokenState) -> Tensor:
        """Score all tokens, ``[T, 2]``."""
        y = self.norm(state.x)
        own = self.local_out(self.act(self.local_in(y)))
        common = self.global_out(state.mean(self.act(self.global_in(y))))
        return self.out(own + state.layout.spread(common))


@register("dynamicvit")
@dataclass(eq=False, kw_only=True, repr=False)
class DynamicViT(GatedReducer):
    """Learned predictors keep a fixed share of the patches, stage by stage."""

    paper: ClassVar[str] = "Rao et al., DynamicViT, NeurIPS 2021"
    summary: ClassVar[str] = "small learned predictors drop patches before three blocks"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"ratio": 2.0, "kl": 0.5, "token": 0.5}
    softmax_eps: ClassVar[float | None] = 1e-6

    def build(self, spec: BackboneSpec) -> None:
        """Make one predictor per stage."""
        super().build(spec)
        self.predictors = nn.ModuleList(Predictor(spec.width) for _ in self.active_blocks)

    def logits(self, stage: int, state: TokenState) -> Tensor:
        """Score the patches with the predictor of this stage."""
        return state.after_prefix(self.predictors[stage](state))

    def shift(self, stage: int, amount: float) -> None:
        """Move the last bias of this stage's predictor."""
        predictor = self.predictors[stage]
        assert isinstance(predictor, Predictor)
        predictor.shift(amount)

    def gate_macs(self, stage: int, tokens: int) -> int:
        """Count the predictor of this stage."""
        predictor = self.predictors[stage]
        assert isinstance(predictor, Predictor)
        return predictor.macs(tokens)
