"""DynamicViT: small predictors before three blocks decide which patches go on.

Paper: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
NeurIPS 2021, and its extension in T-PAMI 2023.

Scored: every patch by an MLP on its own features and the mean features of the patches still
alive. The others are dropped for good. Stage s keeps ``floor(N * keep**s)`` of the N original
patches. In training all tokens are computed, gates are sampled, and the attention mask carries
the gradient; deployed, the best-scored patches are gathered.

Training: required for the predictors (30 epochs in the paper), with the ratio loss below, a KL
term to the dense model's logits and a mean square error on its kept final tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import BackboneSpec, GatedReducer, TokenState, linear_cost
from foveate.registry import register

__all__ = ["DynamicViT", "Predictor"]


class Predictor(nn.Module):
    """Log-probabilities of keeping and dropping, from local and global features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, state: TokenState) -> Tensor:
        """Score all tokens, ``[T, 2]``."""
        norm, into, act = self.local
        first = self.out[0]
        assert isinstance(into, nn.Linear) and isinstance(first, nn.Linear)
        half = first.in_features // 2
        # Local and shared channels in two products: a slice of one would be copied. The mean is
        # the same for all tokens of an image, so its half of the next layer runs once an image
        # instead of once a token.
        y = norm(state.x)
        local, shared = (
            act(F.linear(y, into.weight[part], into.bias[part]))
            for part in (slice(None, half), slice(half, None))
        )
        own = F.linear(local, first.weight[:, :half])
        common = F.linear(state.mean(shared), first.weight[:, half:], first.bias)
        z = own + state.layout.spread(common)
        for layer in self.out[1:]:
            z = layer(z)
        return z.float().log_softmax(-1)


@register("dynamicvit")
@dataclass(eq=False, kw_only=True, repr=False)
class DynamicViT(GatedReducer):
    """Learned predictors keep a fixed share of the patches, stage by stage."""

    paper: ClassVar[str] = "Rao et al., DynamicViT, NeurIPS 2021"
    summary: ClassVar[str] = "small learned predictors drop patches before three blocks"
    loss_weights: ClassVar[Mapping[str, float]] = {"ratio": 2.0, "kl": 0.5, "token": 0.5}
    softmax_eps: ClassVar[float] = 1e-6

    def build(self, spec: BackboneSpec) -> None:
        """Make one predictor a stage."""
        super().build(spec)
        self.predictors = nn.ModuleList(Predictor(spec.width) for _ in self.acts)

    def logits(self, stage: int, state: TokenState) -> Tensor:
        """Predictor of this stage over the live patches."""
        return state.after_prefix(self.predictors[stage](state))

    def scoring(self, stage: int, tokens: int) -> int:
        """Every layer once a token, but for the mean's half of one of them."""
        assert self.spec is not None
        half = self.spec.width // 2
        return tokens * linear_cost(self.predictors[stage]) - (tokens - 1) * half * half
